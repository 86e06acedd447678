"""Steps that go on while somebody else runs the machine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from tests.fake_agent import FakeAgent, Program
from understudy.agent.calls import Call
from understudy.agent.channel import Channel
from understudy.agent.setup import LEAVE_MS, LOOK_MS, power_off, shut_down
from understudy.agent.steps import Unattended
from understudy.agent.unattended import whole
from understudy.clock import ManualClock
from understudy.devices.agent import Agent
from understudy.devices.board import Board
from understudy.devices.wires import Wires


def made(*programs: Program) -> tuple[FakeAgent, Channel]:
    port = Agent(Wires(ManualClock()))
    board = SimpleNamespace(parts={"agent": port})
    return FakeAgent(port, list(programs)), Channel(cast(Board, board))


def test_a_command_that_is_given_before_the_agent_is_there() -> None:
    agent, channel = made(Program(b"out", 7, b"err"))
    heard, statuses, problems = list[bytes](), list[int](), list[Exception]()
    Unattended(channel, whole(b"make", heard.append, statuses.append), problems.append)
    assert agent.calls == []
    agent.start()
    assert (agent.commands, heard, statuses, problems) == ([b"make"], [b"out", b"err"], [7], [])
    assert agent.open_files == set() and channel.is_idle


def test_what_comes_after_takes_the_place_of_what_is_under_way() -> None:
    agent, channel = made(Program(b"", None))
    problems, statuses = list[Exception](), list[int]()
    agent.start()
    Unattended(channel, whole(b"sleep", lambda data: None, statuses.append), problems.append)
    assert not channel.is_idle
    agent.is_deaf_to_reboot = True
    Unattended(channel, power_off(), problems.append)
    assert agent.calls[-2:] == [Call.SYNC, Call.REBOOT]
    assert (problems, statuses) == ([], [])


def test_the_end_of_a_command_may_begin_the_next() -> None:
    agent, channel = made(Program(b"out", 0), Program(b"", None))

    def begin(ended: Callable[[int], None]) -> None:
        Unattended(channel, whole(b"make", lambda data: None, ended), lambda problem: None)

    agent.start()
    begin(lambda status: begin(lambda status: None))
    assert agent.commands == [b"make", b"make"]
    assert channel.on_answer is not None


def test_a_failure_is_told_once() -> None:
    agent, channel = made()
    problems = list[Exception]()
    agent.start()
    Unattended(channel, whole(b"a\0b", lambda data: None, lambda status: None), problems.append)
    (problem,) = problems
    assert "has a zero in it" in str(problem)


@pytest.mark.parametrize("runs", ["nothing", "a command", "a stubborn one"])
def test_programs_are_told_and_waited_for_before_the_guest_is_switched_off(runs: str) -> None:
    agent, channel = made(Program(b"", None))
    agent.start()
    if runs != "nothing":
        Unattended(channel, whole(b"sleep", lambda data: None, lambda status: None), pytest.fail)
    agent.is_deaf_to_reboot, agent.is_stubborn = True, runs == "a stubborn one"
    Unattended(channel, shut_down(3 * LEAVE_MS), lambda problem: None)
    calls = agent.calls[agent.calls.index(Call.KILL) :]
    assert [call for call in calls if call not in (Call.POLL, Call.WAIT4)] == [
        Call.KILL, Call.KILL, Call.KILL, Call.SYNC, Call.REBOOT
    ]  # fmt: skip
    assert calls.count(Call.POLL) * LOOK_MS == LEAVE_MS * (3 if agent.is_stubborn else 1)
