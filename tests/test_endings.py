"""How commands end that are interrupted, or cannot write: a line, a status, no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tree import ROOT
from understudy.guests import hello

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
BEGUN = "import sys; from understudy.__main__ import main; print(flush=True); sys.exit(main())"


def spinning(folder: Path) -> list[str]:
    """Arguments that run a guest without end."""
    file = folder / "kernel"
    image = bytearray(hello.image())
    image[-len(hello.code()) : -len(hello.code()) + 2] = b"\xeb\xfe"
    file.write_bytes(image)
    return ["run", "--kernel", str(file)]


@pytest.mark.parametrize("after_s", [0.02, 0.05, 0.2, 3.0])
def test_an_interrupt_is_a_line_whenever_it_comes(tmp_path: Path, after_s: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BEGUN, *spinning(tmp_path)], env=ENVIRONMENT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(after_s)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, b"understudy: interrupted\n")


@pytest.mark.parametrize(
    ("output", "counts", "line"),
    [
        ("/dev/full", "/dev/null", b"standard output: No space left on device"),
        ("/dev/null", "/dev/full", b"--counts: /dev/full: No space left on device"),
        ("/dev/null", "/", b"--counts: / cannot be written: choose another name"),
    ],
)
def test_what_cannot_be_written_is_named(output: str, counts: str, line: bytes) -> None:
    with Path(output).open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "understudy", "run", "--guest", "hello", "--counts", counts],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE,
            check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"understudy: " + line + b"\n")
