"""Which virtiofsd is taken, how it is started, and what is said where that cannot be."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.backends.real_virtiofsd import needs_virtiofsd
from understudy.backends import virtiofsd
from understudy.backends.folder import ShareError
from understudy.backends.virtiofsd import NEEDED, Virtiofsd, found

ALL = " ".join(NEEDED)


def program(folder: Path, version: str, usage: str = ALL, then: str = "exit 1") -> Path:
    """A script that calls itself virtiofsd."""
    folder.mkdir(exist_ok=True)
    path = folder / "virtiofsd"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "{version}";;\n--help) echo "{usage}";;\n'
        f"*) {then};;\nesac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A computer on which there is none; one in this folder would be in $PATH."""
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "other" / "virtiofsd"),))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    if any(os.access(f"{place}/virtiofsd", os.X_OK) for place in ("/usr/bin", "/bin")):
        pytest.skip("one is among the computer's own programs")
    return tmp_path / "bin"


def test_the_first_that_is_fit_is_taken(alone: Path) -> None:
    elsewhere = program(alone.parent / "other", "virtiofsd 1.14.0")
    assert found(Path("/x")) == str(elsewhere)
    program(alone, "virtiofsd version 7.2.22 (Debian 1:7.2)")
    assert found(Path("/x")) == str(elsewhere), "that of QEMU is passed over"
    own = program(alone, "virtiofsd 1.13.2")
    assert found(Path("/x")) == str(own)


@pytest.mark.parametrize(
    ("version", "usage", "words"),
    [
        ("virtiofsd version 7.2.22 (Debian 1:7.2)", ALL, "is not the virtiofsd that can do"),
        ("virtiofsd 1.4.0", "--fd --modcaps --uid-map", "1.4.0 is too old, it has no --readonly"),
        ("virtiofsd 1.12.1", ALL.replace("--translate-uid", ""), "it has no --translate-uid"),
        ("", ALL, r"is not the virtiofsd that can do without root \(''\)"),
    ],
)
def test_one_that_is_unfit_is_named(alone: Path, version: str, usage: str, words: str) -> None:
    path = program(alone, version, usage)
    with pytest.raises(ShareError, match=words) as refused:
        found(Path("/x"))
    said = str(refused.value)
    assert said.startswith(f"share /x: {path} ") and "server=python" in said and "\n" not in said


def test_none_and_one_that_cannot_be_run(alone: Path) -> None:
    with pytest.raises(ShareError, match=r"^share /x: there is no virtiofsd on this computer"):
        found(Path("/x"))
    program(alone, "").write_bytes(b"\x7fELF and no more")
    with pytest.raises(ShareError, match="cannot be run"):
        found(Path("/x"))


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("echo '[2026 ERROR a] first' >&2; echo '[x] no sandbox' >&2; exit 1", "no sandbox"),
        ("exit 0", "it has ended"),
        ("exec sleep 1000", r"it did not answer within 0\.2 s"),
    ],
)
def test_one_that_ends_or_says_nothing_is_told_in_its_own_words(
    alone: Path, tmp_path: Path, then: str, words: str
) -> None:
    path = program(alone, "virtiofsd 1.14.0", then=f"echo $$ >{tmp_path}/pid; {then}")
    patience_s = 0.2 if "sleep" in then else 60.0
    with pytest.raises(ShareError, match=f"{path} did not start: {words}; or say") as refused:
        Virtiofsd(tmp_path, is_writable=True, queues=2, longest=(64, 64), patience_s=patience_s)
    assert "\n" not in str(refused.value)
    pid = tmp_path / "pid"
    assert not pid.exists() or not Path(f"/proc/{pid.read_text().strip()}").exists()


@needs_virtiofsd
def test_it_ends_with_its_folder_and_by_a_signal(tmp_path: Path) -> None:
    def start() -> Virtiofsd:
        return Virtiofsd(tmp_path, is_writable=False, queues=2, longest=(4096, 4096))

    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(start()) as one:
        assert Path(f"/proc/{one.pid}").exists() and not one.problem
    assert not Path(f"/proc/{one.pid}").exists()
    with closing(start()) as one:
        os.killpg(one.pid, 9)
        for _ in range(2):
            with pytest.raises(OSError, match="virtiofsd: it has ended"):
                one.ask(1, bytes(40), 16)
        assert not Path(f"/proc/{one.pid}").exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def wait_until(pid: int, state: str) -> None:
    """Until all threads of a process are in this state of proc(5), or there is none."""
    ends = time.monotonic() + 60
    while True:
        try:
            threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        except OSError:
            continue  # one has gone meanwhile
        if all(text.rpartition(")")[2].split()[0] == state for text in threads):
            return
        assert time.monotonic() < ends, threads
        time.sleep(0.01)


@needs_virtiofsd
def test_one_that_stands_still_is_waited_for_once_and_ended(tmp_path: Path) -> None:
    with closing(
        Virtiofsd(tmp_path, is_writable=False, queues=2, longest=(4096, 4096), patience_s=2.0)
    ) as one:
        children = Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split()
        os.killpg(one.pid, signal.SIGSTOP)
        for pid in map(int, children):
            wait_until(pid, "T")
        for _ in range(2):
            with pytest.raises(OSError, match="did not answer within 2 s"):
                one.ask(1, bytes(40), 16)
        assert not Path(f"/proc/{one.pid}").exists()


@needs_virtiofsd
def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path; from understudy.backends.virtiofsd import Virtiofsd\n"
        f"one = Virtiofsd(Path({str(tmp_path)!r}), is_writable=True, queues=2, longest=(64, 64))\n"
        "print(one.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(int(done.stdout), "Z")  # or is gone: not everybody asks how orphans ended


def test_a_folder_for_sockets_with_a_long_path_is_one_line(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(alone, "virtiofsd 1.14.0")
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ShareError, match=r"virtiofsd: AF_UNIX path too long$"):
        Virtiofsd(tmp_path, is_writable=True, queues=2, longest=(64, 64))
