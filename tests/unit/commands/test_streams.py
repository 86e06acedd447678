"""What a user types for a command with a terminal."""

from types import SimpleNamespace
from typing import Any

from understudy.agent.command import CLOSED
from understudy.agent.running import Command
from understudy.commands.streams import _ByHand


def test_a_key_for_a_command_that_has_closed_its_terminal_is_dropped() -> None:
    job: Any = SimpleNamespace(process=3, input=CLOSED)
    asked: Any = None  # nobody is
    command = Command(job, asked, asked, asked, has_terminal=True)
    assert not command.is_over and _ByHand().pass_on(b"x", command)
    assert command.unsent == 0
    job.input = 4
    assert _ByHand().pass_on(b"x", command) and command.unsent == 1
