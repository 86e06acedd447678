"""The agent's port: bytes go in and come out, and nobody else is at it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.clock import ManualClock
from understudy.devices.agent import DATA, HELLO, Agent
from understudy.devices.wires import Wires

AGENT, OTHER = 0x1000, 0x2000  # roots of page tables


class Bench:
    """A port, and the process that is at it."""

    def __init__(self) -> None:
        self.process, self.rings, self.output = AGENT, 0, b""
        self.part = Agent(Wires(ManualClock()), who=lambda: self.process, ring=self._ring)
        self.part.on_output.append(self._hear)

    def _ring(self) -> None:
        self.rings += 1

    def _hear(self, data: bytes) -> None:
        self.output += data

    def hello(self) -> None:
        self.part.write(0, HELLO, 0, 4)

    def take(self, count: int) -> bytes:
        return self.part.read_string(0, DATA, count)


@pytest.fixture
def b() -> Bench:
    """One whose agent is there."""
    bench = Bench()
    bench.hello()
    return bench


def test_bytes_go_in_and_come_out(b: Bench) -> None:
    b.part.send(b"una")
    b.part.send(b"me -a")
    assert b.rings == 2
    assert (b.take(5), b.part.read(0, DATA, 2), b.take(1)) == (b"uname", 0x2D20, b"a")
    b.part.write_string(0, DATA, b"Lin")
    b.part.write(0, DATA, int.from_bytes(b"ux", "little"), 2)
    assert b.output == b"Linux"


def test_what_is_not_there_reads_as_ones(b: Bench) -> None:
    b.part.send(b"ab")
    assert b.take(4) == b"ab\xff\xff"
    assert b.part.read(0, DATA, 4) == 0xFFFF_FFFF
    assert b.part.read(0, HELLO, 4) == 0xFFFF_FFFF


def test_nobody_is_there_before_somebody_says_so() -> None:
    b = Bench()
    b.part.write_string(0, DATA, b"early")
    assert (b.output, b.part.is_there) == (b"", False)
    b.hello()
    assert b.part.is_there


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([DATA, HELLO]), st.integers(0, 0x1FF))))
def test_only_the_agent_reaches_its_registers(accesses: list[tuple[bool, int, int]]) -> None:
    b = Bench()
    b.hello()
    b.part.send(b"one")
    b.process = OTHER
    for is_read, offset, value in accesses:
        if is_read:
            assert b.part.read(0, offset, 4) == 0xFFFF_FFFF
            assert b.part.read_string(0, offset, 3) == b"\xff\xff\xff"
        else:
            b.part.write(0, offset, value, 4)
    b.part.write_string(0, DATA, b"forged")
    b.process = AGENT
    assert (b.output, b.take(3)) == (b"", b"one")


def test_it_goes_with_a_snapshot_and_ends_with_a_reset(b: Bench) -> None:
    b.part.send(b"echo")
    b.take(1)
    other = Bench()
    other.part.load(json.loads(json.dumps(b.part.save())))
    assert other.take(4) == b"cho\xff"
    other.process = OTHER
    other.part.write_string(0, DATA, b"forged")
    assert other.output == b""
    other.part.reset()
    other.hello()  # of the next boot, by whichever process it is there
    other.part.send(b"again")
    assert other.take(5) == b"again"
