"""`understudy run` as a whole, in processes of its own: consoles, commands, counts, bad guests."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pexpect
import pytest

from tests.tree import ROOT
from understudy.guests import debian, hello

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def run(
    *arguments: str, stdin: bytes | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[bytes]:
    """One `understudy run`, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "understudy", "run", *arguments],
        input=stdin if stdin is not None else b"",
        capture_output=True,
        check=False,
        timeout=seconds,
        env=_ENVIRONMENT,
    )


def kernel(folder: Path, code: str) -> str:
    """A kernel file that is the built-in guest with other code (hexadecimal) at its entry."""
    head = len(hello.image()) - len(hello.code())
    program = bytes.fromhex(code).ljust(len(hello.code()), b"\0")
    file = folder / "kernel.elf"
    file.write_bytes(hello.image()[:head] + program)
    return str(file)


@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_hello(engine: str) -> None:
    done = run("--guest", "hello", "--engine", engine)
    assert (done.returncode, done.stdout, done.stderr) == (0, hello.MESSAGE, b"")


def test_counts_are_written_and_are_the_same_every_time(tmp_path: Path) -> None:
    counts = []
    for name in ("one", "two"):
        done = run("--guest", "hello", "--counts", str(tmp_path / name))
        assert done.returncode == 0
        counts.append(json.loads((tmp_path / name).read_text()))
    for count in counts:
        del count["engine"], count["kicks"]  # how the machine was fast, and how often it was asked
    assert counts[0] == counts[1]
    # One OUT for each byte, at least one IN before it, and the power-off.
    assert sum(counts[0]["exits"].values()) > 2 * len(hello.MESSAGE)
    assert counts[0]["instructions"] > 10 * len(hello.MESSAGE)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("0f0b", b"triple fault"),  # ud2, and there is no IDT
        ("faf4", b"nothing can wake it"),  # cli; hlt
    ],
)
def test_a_guest_that_dies_is_reported_with_its_state(
    tmp_path: Path, code: str, words: bytes
) -> None:
    done = run("--kernel", kernel(tmp_path, code))
    assert done.returncode == 1
    assert done.stderr.startswith(b"understudy: the guest ended: ")
    assert words in done.stderr.splitlines()[0]
    assert b"RIP" in done.stderr.upper()
    assert b"Traceback" not in done.stderr


def test_a_guest_that_spins_is_ended_by_the_timeout(tmp_path: Path) -> None:
    done = run("--kernel", kernel(tmp_path, "ebfe"), "--timeout", "1s", seconds=30)
    assert done.returncode == 1
    assert done.stderr.startswith(b"understudy: the time that --timeout gave is over")


@pytest.mark.parametrize(
    ("content", "memory", "words", "status"),
    [
        (b"", "64M", b"is empty", 1),
        (b"\x00" * 5000, "64M", b"not a kernel", 1),
        (hello.image()[:100], "64M", b"understudy: ", 1),
        (hello.image(), "100T", b"expected 1M to", 2),
    ],
)
def test_bad_kernels_and_sizes_are_one_line(
    tmp_path: Path, content: bytes, memory: str, words: bytes, status: int
) -> None:
    file = tmp_path / "kernel"
    file.write_bytes(content)
    done = run("--kernel", str(file), "--memory", memory)
    assert done.returncode == status
    assert words in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert b"a bug in understudy" not in done.stderr
    assert done.stdout == b""


def test_sigterm_gives_the_terminal_back(tmp_path: Path) -> None:
    """A spinning guest at a terminal; SIGTERM; the terminal is as it was."""
    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    # Its own session, with the terminal as controlling terminal: that makes it interactive.
    command = [sys.executable, "-m", "understudy", "run", "--kernel", kernel(tmp_path, "ebfe")]
    child = subprocess.Popen(
        ["setsid", "-c", *command],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=_ENVIRONMENT,
    )
    said = b""
    while b"ends the guest" not in said:
        said += os.read(outer, 4096)
    os.write(outer, b"\x1dh")
    while b"show this help" not in said:
        said += os.read(outer, 4096)
    assert termios.tcgetattr(inner) != before
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 128 + signal.SIGTERM
    assert termios.tcgetattr(inner) == before
    os.close(outer)
    os.close(inner)


def test_the_escape_key_ends_a_guest(tmp_path: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "understudy", "run", "--kernel", kernel(tmp_path, "ebfe")],
        env=_ENVIRONMENT,  # type: ignore[arg-type]
        timeout=30,
    )
    child.expect("ends the guest")
    child.send("\x1d")
    child.send("q")
    child.expect("ended by the user")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1


def test_counts_in_the_last_line(tmp_path: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "understudy", "run", "--kernel", kernel(tmp_path, "ebfe"), "--watch"],
        env=_ENVIRONMENT,  # type: ignore[arg-type]
        timeout=30,
        dimensions=(24, 100),
    )
    child.expect_exact("\x1b[1;23r")  # the guest scrolls in the rows above
    child.expect(r"\x1b\[24;1H\x1b\[0;7m [0-9.]+ s  [0-9,]+ M instructions  [0-9,]+ MIPS")
    child.send("\x1dl")
    child.expect_exact("\x1b[r")
    child.send("\x1dl")
    child.expect_exact("\x1b[1;23r")
    child.send("\x1dq")
    child.expect_exact("\x1b[r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1


def test_there_is_no_last_line_without_a_terminal() -> None:
    done = run("--guest", "hello", "--watch")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--watch needs a terminal" in done.stderr


@pytest.mark.real_guest
def test_a_command_with_its_output_alone_and_its_status() -> None:
    done = run("--guest", "cloud-amd64", "--exec", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


@pytest.mark.real_guest
def test_a_command_in_a_kernel_of_ones_own() -> None:
    own = debian.fetch("cloud-amd64").kernel
    assert isinstance(own, Path)
    done = run("--kernel", str(own), "--exec", "uname -s")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Linux\n", b"")


@pytest.mark.real_guest
def test_a_pipe_types_and_its_end_does_not_end_the_guest() -> None:
    done = run("--guest", "cloud-amd64", stdin=b"echo $((6*7))-is-it\npoweroff\n")
    assert done.returncode == 0, done.stderr
    assert b"42-is-it" in done.stdout


@pytest.mark.real_guest
def test_too_little_memory_is_one_line() -> None:
    done = run("--guest", "cloud-amd64", "--memory", "16M")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"understudy: " in done.stderr


@pytest.mark.real_guest
def test_the_timeout_also_holds_for_a_command() -> None:
    done = run("--guest", "cloud-amd64", "--exec", "while :; do :; done", "--timeout", "15s")
    assert done.returncode == 1
    assert b"did not come within" in done.stderr
    assert done.stderr.startswith(b"understudy: ")
