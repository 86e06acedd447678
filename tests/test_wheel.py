"""The wheel that `make build` leaves runs a guest in an empty virtual environment.

For Python 3.11 and for each newer one on this computer: the wheel is abi3, so one fits all.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT

_CLEAN = {
    k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")
}
NAMES = ("python3.11", "python3.12", "python3.13", "python3.14")


def _works(python: str) -> bool:
    """Whether there is such a Python with venv (a name on PATH may be an empty shim)."""
    path = shutil.which(python)
    if path is None:
        return False
    check = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True, check=False)
    return check.returncode == 0


def _pythons() -> list[str]:
    """Every suitable Python here, ours included; pyenv's versions too, which hide behind shims."""
    found = {name: shutil.which(name) for name in NAMES if _works(name)}
    for version in sorted(Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python3")):
        name = f"python{'.'.join(version.parts[-3].split('.')[:2])}"
        if name not in found and _works(str(version)):
            found[name] = str(version)
    return [path for _, path in sorted(found.items()) if path is not None] or [sys.executable]


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Built by make, as a user would."""
    if not (ROOT / ".venv/stamps/packages").exists():
        pytest.skip("make setup has not been run here")
    subprocess.run(["make", "build"], cwd=ROOT, env=_CLEAN, check=True, timeout=900)
    (built,) = (ROOT / "dist").glob("*.whl")
    return built


@pytest.mark.timeout(1200)
def test_the_wheel_is_abi3(wheel: Path) -> None:
    """One wheel for CPython 3.11 and all that follow."""
    assert re.fullmatch(r"understudy-[\d.]+-cp311-abi3-\w*linux\w*_x86_64\.whl", wheel.name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("python", _pythons())
def test_the_wheel_runs_a_guest(wheel: Path, python: str, tmp_path: Path) -> None:
    """Install into an empty environment, run the built-in guest there."""
    subprocess.run([python, "-m", "venv", str(tmp_path / "env")], check=True, env=_CLEAN)
    folder = tmp_path / "env/bin"
    subprocess.run(
        [folder / "python", "-m", "pip", "install", "-q", str(wheel)],
        check=True,
        env=_CLEAN,
        timeout=600,
    )
    done = subprocess.run(
        [folder / "understudy", "run", "--guest", "hello"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=_CLEAN,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Hello from a guest" in done.stdout
