"""Guest memory through the p2m."""

import pytest

from tests.unit.fakes import fake_machine
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import Flag


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
        (0, 0x9FC00), (0x100000, 0xBFF00000), (0x1_0000_0000, 2 << 30),
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


class Swap:
    """Gives frames back, protected; counts who asks."""

    def __init__(self, memory: GuestMemory, *, refuses: bool = False) -> None:
        self.frames, self.refuses = memory.host.frames, refuses
        self.touched, self.wanted = list[int](), list[int]()
        memory.p2m.owners = {Flag.SWAPPED: self, Flag.SEALED: self}

    def write(self, p2m: P2m, gfn: int) -> None:
        self.wanted.append(gfn)
        if not self.refuses:
            p2m.unprotect(gfn, 1, Flag.SEALED)

    def touch(self, p2m: P2m, gfn: int) -> None:
        self.touched.append(gfn)
        p2m.map(gfn, self.frames.allocate(), 1, Flag.SEALED)


def test_a_write_asks_for_each_frame_and_a_read_only_for_absent_ones(memory: GuestMemory) -> None:
    swap = Swap(memory)
    memory.p2m.take(2, 2)
    memory.p2m.protect(5)
    memory.write(0x1FF8, bytes(0x4000))
    assert (swap.touched, swap.wanted) == ([2, 3], [2, 3, 5])
    memory.p2m.take(8, 3)
    memory.p2m.protect(11)
    memory.read(0x8FFF, 0x3000)
    assert memory.hpa(0x8000) is not None
    memory.write(0x9000, b"x")
    assert (swap.touched[2:], swap.wanted[3:]) == ([8, 9, 10], [9])
    assert memory.read(0x9000, 1) == b"x"


def test_a_write_that_is_refused_is_an_error(memory: GuestMemory) -> None:
    Swap(memory, refuses=True)
    memory.p2m.protect(5)
    before = memory.read(0x5000, 8)
    with pytest.raises(GuestMemoryError, match="owner gives no access"):
        memory.write(0x5000, b"12345678")
    assert memory.read(0x5000, 8) == before


def test_writes_are_told_page_by_page_to_whoever_traces(memory: GuestMemory) -> None:
    class Tracer:
        def __init__(self, *gfns: int) -> None:
            self.traced, self.heard = frozenset(gfns), list[tuple[int, int]]()

        def table_written(self, gpa: int, length: int) -> None:
            self.heard.append((gpa, length))

    one, none = Tracer(2, 3), Tracer()
    memory.p2m.tracers += [none, one]
    memory.write(0x1FFE, bytes(0x1004))
    assert (one.heard, none.heard) == ([(0x2000, 0x1000), (0x3000, 2)], [])
