"""The p2m against a dictionary, and guest memory through it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes import fake_machine
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m

CHANGES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 8), st.none() | st.integers(0, 40)), max_size=25
)


@given(CHANGES)
def test_the_p2m_is_a_map(changes: list[tuple[int, int, int | None]]) -> None:
    p2m, oracle, heard = P2m(), dict[int, int](), list[tuple[int, int]]()
    p2m.watchers.append(lambda gfn, count: heard.append((gfn, count)))
    for gfn, count, pfn in changes:
        for i in range(count):
            oracle.pop(gfn + i, None)
            if pfn is not None:
                oracle[gfn + i] = pfn + i
        if pfn is None:
            p2m.unmap(gfn, count)
        else:
            p2m.map(gfn, pfn, count)
        assert heard[-1] == (gfn, count)
    assert {gfn: p2m.lookup(gfn) for gfn in range(50) if p2m.lookup(gfn) is not None} == oracle
    extents = list(p2m)
    for before, after in pairwise(extents):
        assert before.gfn + before.frames <= after.gfn
        joined = before.gfn + before.frames == after.gfn
        assert not (joined and before.pfn + before.frames == after.pfn)
    cut = p2m.within(5, 10)
    assert {e.gfn + i: e.pfn + i for e in cut for i in range(e.frames)} == {
        gfn: pfn for gfn, pfn in oracle.items() if 5 <= gfn < 15
    }


@pytest.fixture
def memory() -> GuestMemory:
    with fake_machine():
        made = GuestMemory(Host("64M"), 16 << 20)
        made.populate()
        return made


def test_ram_moves_around_the_devices() -> None:
    with fake_machine():
        big = GuestMemory(Host("8G"), 5 << 30)
        big.populate()
    assert big.ranges() == [
        (0, 0xA0000), (0x100000, 0xBFF00000), (0x1_0000_0000, 2 << 30),
    ]  # fmt: skip
    assert big.hpa(0xBFFF_FFFF) is not None
    assert big.hpa(0xC000_0000) is None
    assert big.hpa(0x1_7FFF_FFFF) is not None
    assert big.hpa(0x1_8000_0000) is None
    assert all(extent.pfn % (1 << 18) == extent.gfn % (1 << 18) for extent in big.p2m)


def test_reads_and_writes_cross_extents(memory: GuestMemory) -> None:
    spare = memory.host.frames.allocate()
    memory.p2m.map(1, spare, 1)
    memory.write(0xFFE, b"abcd")
    assert memory.read(0xFFE, 4) == b"abcd"
    assert memory.host.memory.read(spare << 12, 2) == b"cd"
    memory.write_u64(0x1FFC, 0x1122334455667788)
    assert memory.read_u64(0x1FFC) == 0x1122334455667788
    assert memory.read_u32(0x1FFE) == 0x33445566
    assert memory.read(0, 0) == b""


@pytest.mark.parametrize("gpa", [16 << 20, (16 << 20) - 1, 1 << 60, -1])
def test_what_is_no_ram_is_refused_with_what_is(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(GuestMemoryError, match="expected RAM, which lies at 0x0"):
        memory.read(gpa, 2)
    with pytest.raises(GuestMemoryError):
        memory.write(gpa, b"ab")
