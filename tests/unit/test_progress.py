"""The status line: patient, only on a terminal, and gone when it ends."""

import io

from rich.console import Console

from understudy.commands.progress import StatusLine


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _line(terminal: bool) -> tuple[StatusLine, io.StringIO, _Clock]:
    out, clock = io.StringIO(), _Clock()
    kind = {"TERM": "xterm"}
    console = Console(
        file=out, force_terminal=terminal, width=120, color_system=None, _environ=kind
    )
    return StatusLine("cloud-amd64", console, clock), out, clock


def test_silent_while_things_go_quickly() -> None:
    line, out, clock = _line(True)
    clock.now = 1.9
    line.running(1, 1)
    assert not line.shown
    assert out.getvalue() == ""


def test_says_guest_time_instructions_and_speed() -> None:
    line, out, clock = _line(True)
    line.running(0, 0)
    clock.now = 4.0
    line.running(1_500_000_000, 2_000_000_000)
    assert line.shown
    for words in ("cloud-amd64", "1.50 s", "2,000 M instructions", "500 MIPS"):
        assert words in out.getvalue()
    line.clear()
    assert not line.shown


def test_silent_without_a_terminal() -> None:
    line, out, clock = _line(False)
    clock.now = 60.0
    line.say("fetching")
    assert out.getvalue() == ""
