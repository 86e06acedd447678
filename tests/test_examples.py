"""Every example runs and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT, files

EXPECTED = {
    "count_exits": r"(?m)^EPT_VIOLATION +\d+$",
    "fork": r"\A(clone-\d\n){8}understudy\n\Z",
    "overcommit": r"\A\['Linux', 'Linux', 'Linux'\]\n([abc]: 24576 pages \(.*\d+ shared.*\n){3}\Z",
    "round_robin": r"\Afirst: poweroff, \d+ instructions\nsecond: poweroff, \d+ instructions\n\Z",
    "techniques": r"\A(Linux under (vmx|bt) and \w+: [\d,]+ exits\n){4}\Z",
    "two_at_once": r"\A\[5050, 500500\]\n\Z",
    "uname": r"\ALinux 6\.1\.\S+-cloud-amd64\n\Z",
}


def test_every_example_is_expected_to_print_something() -> None:
    """A new example needs a line here."""
    assert {path.stem for path in files("examples", ".py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    """Run as its reader would run it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[name], done.stdout), done.stdout
