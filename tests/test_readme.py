"""Every command that the README shows is run by a test, and the Python in it runs, too.

Why: a README is the first program that anybody runs.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT, text

README = text(Path("README.md"))
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# What each command must print (a pattern), in the README's order.
EXPECTED = {
    "understudy run --guest hello": r"Hello from a guest",
    'understudy run --guest cloud-amd64 --exec "uname -a"': r"\ALinux understudy 6\.1\..+\n\Z",
    'understudy run --guest cloud-amd64 --exec "true" --counts counts.json': r"\A\Z",
    "understudy run --guest hello --execution bt --paging lazy": r"Hello from a guest",
    "understudy fetch --list": r"cloud-amd64",
    "understudy lab": r"walk_references +A page walk in two dimensions",
    "understudy lab walk_references": r"(?s)PASSED.*all 21 of 21.*build/lab/report\.html",
    "understudy doctor": r"Guests can run here",
}
# Make targets: `make test` is this run itself; the demo has a test of its own.
MAKE = {"make demo": "tests/test_demo.py", "make test": ".ci/run"}


def test_every_command_has_its_test() -> None:
    """A new command in the README needs a line here."""
    assert set(COMMANDS) == set(EXPECTED) | set(MAKE)
    assert "make test" in text(Path(".ci/run"))
    assert '"make", "demo"' in text(Path("tests/test_demo.py"))


def test_every_make_target_exists() -> None:
    """What the README calls, the Makefile has."""
    targets = set(re.findall(r"^([a-z-]+):", text(Path("Makefile")), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets | {"setup", "build", "help"}


@pytest.mark.parametrize("command", EXPECTED)
def test_the_command_does_what_it_says(command: str, tmp_path: Path) -> None:
    """Status 0, and the output that one expects."""
    arguments = shlex.split(command)
    assert arguments[0] == "understudy"
    done = subprocess.run(
        [sys.executable, "-m", "understudy", *arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[command], done.stdout), done.stdout
    if "--counts" in arguments:
        assert (tmp_path / "counts.json").stat().st_size > 100


@pytest.mark.parametrize("source", PYTHON)
def test_the_python_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the kernel's release and the command's status."""
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert re.search(r"^6\.1\..*\n 0\n", capsys.readouterr().out)
