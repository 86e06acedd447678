"""`understudy run --exec` with `--stdin` and `--tty`: what is piped in, and who sits there."""

import subprocess
import sys

import pexpect
import pytest

from tests.test_run import _ENVIRONMENT, run

RUN = [sys.executable, "-m", "understudy", "run", "--guest", "cloud-amd64"]


@pytest.mark.real_guest
def test_what_is_piped_in_comes_as_it_comes() -> None:
    """Each line is answered before the next is sent, and the end is an end."""
    command = "while read line; do echo got $line; done; echo over; echo err >&2; exit 3"
    with subprocess.Popen(
        [*RUN, "--stdin", "--exec", command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_ENVIRONMENT,
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout and child.stderr
        for word in (b"one", b"two"):
            child.stdin.write(word + b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"got " + word + b"\n"
        child.stdin.close()
        assert child.stdout.read() == b"over\n"
        assert child.stderr.read() == b"err\n"
        assert child.wait(60) == 3


@pytest.mark.real_guest
def test_much_is_piped_through_and_who_reads_no_more_is_no_trouble() -> None:
    data = bytes(range(256)) * 12_000
    done = run("--guest", "cloud-amd64", "-i", "--exec", "cat", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == data
    done = run("--guest", "cloud-amd64", "-i", "--exec", "head -c 3", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data[:3], b"")


def _at_a_terminal(command: str) -> "pexpect.spawn[bytes]":
    return pexpect.spawn(
        RUN[0], [*RUN[1:], "--tty", "--exec", command], env=_ENVIRONMENT, timeout=120,  # type: ignore[arg-type]
        dimensions=(33, 101),
    )  # fmt: skip


@pytest.mark.real_guest
def test_a_command_has_the_terminal_its_size_and_its_keys() -> None:
    child = _at_a_terminal(
        "stty size; tty; trap 'echo caught' INT; echo ready; while ! read x; do :; done; "
        "stty size; echo [$x]; exit 5"
    )
    child.expect_exact("33 101\r\n")
    child.expect(r"/dev/pts/\d+\r\n")
    child.expect_exact("ready\r\n")
    child.send("\x03")
    child.expect_exact("caught\r\n")
    child.setwinsize(20, 60)
    child.send("word\r")
    child.expect_exact("20 60\r\n[word]\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 5


@pytest.mark.real_guest
def test_the_escape_key_ends_a_command() -> None:
    child = _at_a_terminal("echo ready; cat")
    child.expect_exact("ready\r\n")
    child.send("\x1dh")
    child.expect_exact("Ctrl-] q ends the command")
    child.send("\x1dq")
    child.expect_exact("ended by the user")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stdin",), "--stdin and --tty go with --exec"),
        (("--tty",), "--stdin and --tty go with --exec"),
        (("--tty", "--exec", "true"), "--tty needs a terminal at standard input and output"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    done = run("--guest", "hello", *arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert words in done.stderr.decode() and done.stderr.count(b"\n") == 1
