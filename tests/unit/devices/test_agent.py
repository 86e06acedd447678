"""The agent's port: commands in, output and status out, and nobody else at it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.clock import ManualClock
from understudy.devices.agent import CONTROL, DATA, ENDED, HELLO, NOTHING, Agent
from understudy.devices.wires import Wires

AGENT, OTHER = 0x1000, 0x2000  # roots of page tables


class Bench:
    """A port, and the process that is at it."""

    def __init__(self) -> None:
        self.process, self.rings = AGENT, 0
        self.output, self.statuses = b"", list[int]()
        self.part = Agent(Wires(ManualClock()), who=lambda: self.process, ring=self._ring)
        self.part.on_output.append(self._hear)
        self.part.on_exit.append(self.statuses.append)

    def _ring(self) -> None:
        self.rings += 1

    def _hear(self, data: bytes) -> None:
        self.output += data

    def hello(self) -> None:
        self.part.write(0, CONTROL, HELLO, 4)

    def take(self) -> bytes | None:
        length = self.part.read(0, CONTROL, 4)
        if length == NOTHING:
            return None
        return bytes(self.part.read(0, DATA, 1) for _ in range(length))

    def end(self, status: int) -> None:
        self.part.write(0, CONTROL, ENDED + status, 4)


@pytest.fixture
def b() -> Bench:
    """One whose agent is there."""
    bench = Bench()
    bench.hello()
    return bench


def test_a_command_goes_in_and_its_output_and_status_come_out(b: Bench) -> None:
    assert b.take() is None
    b.part.request(b"uname")
    assert (b.rings, b.part.is_busy, b.take(), b.take()) == (1, True, b"uname", None)
    b.part.write_string(0, DATA, b"Lin")
    b.part.write(0, DATA, int.from_bytes(b"ux", "little"), 2)
    b.end(7)
    assert (b.output, b.statuses, b.part.is_busy) == (b"Linux", [7], False)
    b.part.request(b"")
    assert b.take() == b""
    b.end(255)
    assert b.statuses == [7, 255]


def test_a_command_may_be_given_before_the_agent_is_there() -> None:
    b = Bench()
    b.part.request(b"true")
    assert (b.rings, b.part.is_there) == (0, False)
    b.hello()
    assert (b.rings, b.take()) == (1, b"true")
    with pytest.raises(RuntimeError, match="busy"):
        b.part.request(b"false")


def test_what_is_given_up_does_not_disturb_the_next(b: Bench) -> None:
    b.part.request(b"hangs")
    b.take()
    b.part.give_up()
    b.part.write_string(0, DATA, b"late")
    b.part.request(b"next")
    b.part.write_string(0, DATA, b"later")
    b.end(1)
    assert (b.output, b.statuses, b.take()) == (b"", [], b"next")
    b.end(0)
    b.end(9)
    assert b.statuses == [0]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([DATA, CONTROL]), st.integers(0, 0x1FF))))
def test_only_the_agent_reaches_its_registers(accesses: list[tuple[bool, int, int]]) -> None:
    b = Bench()
    b.hello()
    b.part.request(b"one")
    for waits in (True, False):
        b.process = OTHER
        for is_read, offset, value in accesses:
            if is_read:
                assert b.part.read(0, offset, 4) == NOTHING
            else:
                b.part.write(0, offset, value, 4)
        b.part.write_string(0, DATA, b"forged")
        b.process = AGENT
        assert (b.output, b.statuses) == (b"", [])
        assert b.take() == (b"one" if waits else None)
    b.end(3)
    assert b.statuses == [3]


def test_it_goes_with_a_snapshot_and_ends_with_a_reset(b: Bench) -> None:
    b.part.request(b"echo")
    other = Bench()
    other.part.load(json.loads(json.dumps(b.part.save())))
    assert other.take() == b"echo"
    assert other.part.read(0, DATA, 1) == 0xFF
    other.process = OTHER
    other.end(0)
    assert other.statuses == []
    other.part.reset()
    other.hello()  # of the next boot, by whichever process it is there
    other.part.request(b"again")
    assert other.take() == b"again"
