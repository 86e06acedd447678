"""Setting up: what is missing is said in one clear line each; what pip installs is what we name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT, text


def _require(
    folder: Path, python: str, *, leave_out: str = "", cargo: str = "echo cargo 1.999.0"
) -> subprocess.CompletedProcess[str]:
    """Run tools/require with a PATH that has cargo, cc and a few tools, but for one."""
    for name, says in (("cargo", cargo), ("cc", "exit 0")):
        if name != leave_out:
            (folder / name).write_text(f"#!/bin/sh\n{says}\n")
            (folder / name).chmod(0o755)
    for name in ("head", "sed", "sort", "dirname"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools/require"), python],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_said_when_all_is_there(tmp_path: Path) -> None:
    done = _require(tmp_path, sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", ["cargo", "cc"])
def test_a_missing_tool_is_one_line_with_advice(tmp_path: Path, missing: str) -> None:
    done = _require(tmp_path, sys.executable, leave_out=missing)
    assert done.returncode == 1
    assert done.stderr.startswith(f"understudy: {missing} is missing: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("cargo", "words"),
    [
        ("echo cargo 0.66.0", "cargo is 0.66.0, and understudy needs Rust 1."),
        ("echo 'error: toolchain is not installed'; exit 1", "(error: toolchain is not installed)"),
    ],
)
def test_an_unfit_cargo_is_one_line(tmp_path: Path, cargo: str, words: str) -> None:
    done = _require(tmp_path, sys.executable, cargo=cargo)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 1", "is no Python 3.11 or newer"),
        ('case "$2" in *version*) exit 0;; esac; exit 1', "has no venv module"),
    ],
)
def test_an_unfit_python_is_one_line(tmp_path: Path, script: str, words: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = _require(tmp_path, str(python))
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_python_at_all_is_one_line(tmp_path: Path) -> None:
    done = _require(tmp_path, "")
    assert done.returncode == 1
    assert "no Python 3.11 or newer was found" in done.stderr


def test_pip_gets_every_requirement_and_no_other() -> None:
    done = subprocess.run(
        [sys.executable, "tools/requirements.py", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert all(f'"{line}"' in text(Path("pyproject.toml")) for line in lines)
    assert {"typer", "maturin", "pytest"} <= {line.split(">")[0].split("[")[0] for line in lines}


def test_the_help_lists_the_targets() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    )
    for target in ("setup", "build", "check", "test", "test-all", "fuzz", "bench", "demo", "help"):
        assert f"make {target} " in done.stdout
