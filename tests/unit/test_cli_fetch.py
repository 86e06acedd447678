"""`understudy fetch`: progress, listing, and each failure as one line."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from understudy import cli
from understudy.commands.progress import Steps, bar
from understudy.guests import debian
from understudy.guests.apt import Progress
from understudy.guests.cache import Cache
from understudy.guests.debian import Guest
from understudy.guests.entry import GuestError
from understudy.linux import VM


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were asked for, with a package client that always has everything."""
    names: list[str] = []

    def fetch(name: str, progress: Progress) -> Guest:
        if name == "broken":
            raise GuestError("no package client: install apt")
        names.append(name)
        progress("Downloading", 0.5)
        progress("Downloading", 1.0)
        return Guest(name, "a guest", "6.1.9", Path("k"), None, "")

    monkeypatch.setattr(debian, "fetch", fetch)
    return names


def test_the_usual_guest_is_the_default(
    fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fetch"]) == 0
    assert fetched == ["cloud-amd64"]
    out, err = capsys.readouterr()
    assert out == "cloud-amd64 6.1.9 is ready: understudy run --guest cloud-amd64\n"
    assert err == "cloud-amd64: Downloading\n"


def test_each_name_is_fetched_once(fetched: list[str]) -> None:
    assert cli.main(["fetch", "amd64", "memtest86+", "amd64"]) == 0
    assert fetched == ["amd64", "memtest86+"]


def test_a_failure_is_one_line(fetched: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "broken"]) == 1
    assert capsys.readouterr().err == "understudy: no package client: install apt\n"
    assert fetched == []


def test_the_list_shows_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(debian.NAMES)


def test_a_whole_debian_is_made_with_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, asked = Cache(), list[tuple[str, list[str]]]()
    with cache.lock():
        cache.store("debian-12-with", {"disk.qcow2": b"x"}, {"version": "12.4"})

    def whole(name: str, packages: list[str], progress: Progress) -> Path:
        asked.append((name, packages))
        return cache.folder("debian-12-with") / "disk.qcow2"

    monkeypatch.setattr(VM, "whole", whole)
    assert cli.main(["fetch", "debian", "--with", "hello", "--with", "sl"]) == 0
    assert asked == [("debian", ["hello", "sl"])]
    command = "understudy run --guest debian --with hello --with sl"
    assert capsys.readouterr().out == f"debian 12.4 is ready: {command}\n"
    assert cli.main(["fetch", "cloud-amd64", "--with", "hello"]) == 2
    assert "--with goes with a whole Debian, and cloud-amd64 is none" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Steps("amd64", console) as steps:
        steps("Downloading", 0.5)
    assert "████████████░░░░░░░░░░░░  50% Downloading" in out.getvalue()


@pytest.mark.parametrize(("share", "full"), [(0.0, 0), (0.5, 12), (1.0, 24), (7.0, 24), (-1.0, 0)])
def test_the_bar(share: float, full: int) -> None:
    assert bar(share).count("█") == full


def test_no_bar_for_what_cannot_be_measured() -> None:
    assert bar(None) == ""
