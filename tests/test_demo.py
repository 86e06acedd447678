"""`make demo`: with and without a terminal, here, and (slow) on a bare clone.

Source: the README's first command.  Invariant: nothing has to be known or typed beforehand.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pexpect
import pytest

from tests.tree import ROOT

UNAME = "Linux understudy 6.1."
# The tests run in the virtual environment that make made; `make` itself must not see it.
_CLEAN = {
    k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")
}

needs_setup = pytest.mark.skipif(
    not (ROOT / ".venv/stamps/silicon").exists(), reason="make setup has not been run here"
)


def _demo(folder: Path, seconds: float) -> str:
    done = subprocess.run(
        ["make", "demo"],
        cwd=folder,
        env=_CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@needs_setup
def test_without_a_terminal_it_runs_uname() -> None:
    """Runs `uname -a` in the guest, shows it, powers off, status 0."""
    assert UNAME in _demo(ROOT, 240)


@needs_setup
def test_at_a_terminal_one_types_and_powers_off() -> None:
    """A prompt, an answer to what was typed, and `poweroff` ends with status 0."""
    child = pexpect.spawn(
        "make",
        ["demo"],
        cwd=str(ROOT),
        env=_CLEAN | {"TERM": "xterm"},
        timeout=240,  # type: ignore[arg-type]
    )
    child.expect(r"understudy# ")
    child.sendline("echo $((6 * 7))-is-it")
    child.expect("42-is-it")
    child.expect(r"understudy# ")
    child.sendline("poweroff")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_bare_clone(tmp_path: Path) -> None:
    """The whole way, from nothing but a clone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this tree is no git clone")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-local", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in _CLEAN.items() if k != "CARGO_TARGET_DIR"}
    done = subprocess.run(
        ["make", "demo"],
        cwd=clone,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert UNAME in done.stdout
