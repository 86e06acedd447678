"""The command line: every mistake is one clear line and a status; a bug leaves a report."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.core

from understudy import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: status, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def _one_line(err: str) -> str:
    assert err.startswith("understudy: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "say one of --guest NAME, --kernel FILE"),
        (
            ["run", "--guest", "hello", "--kernel", "x"],
            "say one of --guest NAME, --kernel FILE",
        ),
        (["run", "--guest", "hello", "--initrd", "x"], "--initrd goes with --kernel"),
        (["run", "--guest", "hello", "--memory", "256"], "expected a size like 256M or 1G"),
        (["run", "--guest", "hello", "--clock", "sundial"], "sundial"),
        (["run", "--guest", "hello", "--engine", "steam"], "steam"),
        (["run", "--guest", "hello", "--cpu", "z80"], "cpu 'z80': expected one of understudy, max"),
        (["run", "--guest", "hello", "--cpu", "max,+warp"], "cpu feature 'warp': expected one of"),
        (["run", "--guest", "hello", "--paging", "none"], "expected one of eager, ept, lazy, pv, "),
        (["run", "--guest", "hello", "--triple-fault", "x"], "expected one of auto, reset, stop"),
        (["run", "--guest", "hello", "--disk", "a,rw"], "--disk: disk 'a,rw': expected FILE[,ro]"),
        (["run", "--guest", "hello", "--timeout", "soon"], "expected a time like 90s"),
        (["run", "--guest", "hello", "--exec", " "], "--exec is empty"),
        (["run", "--guest"], "requires an argument"),
        (["run", "--frobnicate"], "--frobnicate"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(run: Run, arguments: list[str], words: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert words in _one_line(err)


def test_missing_files_are_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "vmlinuz")
    status, _, err = run("run", "--kernel", nowhere)
    assert (status, _one_line(err)) == (1, f"understudy: {nowhere}: no such file\n")
    status, _, err = run("run", "--kernel", str(tmp_path))
    assert (status, _one_line(err)) == (1, f"understudy: {tmp_path}: not a file\n")
    status, _, err = run("run", "-g", "hello", "--counts", str(tmp_path / "no" / "such.json"))
    assert status == 1
    assert "there is no folder" in _one_line(err)


def test_disks_that_cannot_be_used_are_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    disk, nowhere = tmp_path / "disk.img", tmp_path / "none.img"
    disk.write_bytes(bytes(4096))
    status, _, err = run("run", "--guest", "hello", "--disk", str(nowhere))
    assert status == 1 and f"{nowhere}: no such file" in _one_line(err)
    both = ("--disk", str(disk), "--disk", str(disk))
    status, _, err = run("run", "--guest", "hello", *both)
    assert status == 1 and f"{disk} is in use" in _one_line(err)
    assert run("run", "--guest", "hello", *both, "--snapshot")[0] == 0


@pytest.mark.parametrize("command", ["run", "fetch", "doctor"])
def test_every_command_teaches_with_an_example(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"understudy {command}" in out
    assert "Example" in out


def test_help_names_every_command_and_option(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in ("run", "fetch", "doctor", "--version"))
    _, out, _ = run("run", "--help")
    options = ("guest", "kernel", "initrd", "append", "memory", "clock", "engine", "exec")
    for option in (*options, "counts", "timeout"):
        assert f"--{option}" in out


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out == f"understudy {cli.installed_version()}\n"


def test_cpu_help_lists_what_can_be_chosen(run: Run) -> None:
    for word in ("help", "?"):
        status, out, err = run("run", "--cpu", word)
        assert (status, err) == (0, "")
        assert all(f"\n{model}: " in out for model in ("understudy", "max", "baseline"))
        assert {"smap", "tsc_deadline"} <= set(out.split())


def test_virtio_features_that_can_be_hidden_are_listed_and_others_refused(run: Run) -> None:
    status, out, _ = run("run", "--hide-virtio", "help")
    assert status == 0 and "\n  packed        all virtio devices\n" in out
    assert "\n  mq            virtio_blk, virtio_net\n" in out
    status, _, err = run("run", "--guest", "hello", "--hide-virtio", "packed,pakced")
    assert status and "hide_virtio 'pakced': expected one of discard, event-idx," in err


class _Panic(BaseException):
    """As a panic of the Rust half arrives: no Exception."""


@pytest.mark.parametrize("bug", [RuntimeError("boom\nbang"), _Panic("index out of bounds")])
def test_a_bug_is_one_line_that_names_a_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: BaseException
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise bug

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "app", broken)
    status, _, err = run("doctor")
    assert status == 1
    assert "a bug in understudy itself" in _one_line(err)
    (report,) = (tmp_path / "understudy").iterdir()
    assert str(report) in err
    text = report.read_text()
    assert "Traceback" in text
    assert type(bug).__name__ in text


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device", "/cache/x"), 1, "/cache/x: No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (cli.Refusal("no", status=7), 7, "understudy: no\n"),
    ],
)
def test_errors_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    got, _, err = run("doctor")
    assert got == status
    assert words in _one_line(err)


def test_an_interrupt_while_typer_reads_the_arguments_is_a_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.core.TyperGroup, "make_context", interrupted)
    assert run("doctor") == (130, "", "understudy: interrupted\n")


def test_a_reader_that_leaves_is_no_bug(tmp_path: Path) -> None:
    """`understudy --help | head -n 0` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-m", "understudy", "run", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
    )
    os.close(write)
    assert child.returncode != 0
    assert child.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "status"),
    [("--version", 0), ("doctor", 0), ("run --guest hello", 0), ("control nowhere", 1)],
)
def test_closed_streams_are_no_bug(tmp_path: Path, closed: str, command: str, status: int) -> None:
    child = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m understudy {command} {closed}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
    )
    assert child.returncode == status
    assert "bug" not in child.stderr and "Traceback" not in child.stderr
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_complain_leaves_the_status() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m understudy run 2>/dev/full"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [["fetch", "--list"], ["run", "--help"], ["--version"]])
def test_a_full_disk_is_one_line(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "understudy", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert child.returncode == 1
    assert _one_line(child.stderr) == "understudy: No space left on device\n"


def test_help_needs_no_machine() -> None:
    """`understudy doctor` and --help must work where the compiled half is missing."""
    code = "import sys; sys.modules['understudy._silicon'] = None; import understudy.cli as c; "
    child = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(c.main(['doctor']))"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert child.returncode == 1
    assert "make setup" in child.stdout
    assert "understudy: guests cannot run here" in child.stderr
    assert "Traceback" not in child.stderr
