"""Bus: dispatch, splitting, unclaimed accesses; lines."""

import pytest

from understudy.clock import ManualClock
from understudy.devices.debug_exit import DebugExit
from understudy.devices.wires import Wires
from understudy.machine.bus import (
    ELSEWHERE,
    PAGES_KEPT,
    STRAYS_KEPT,
    Bus,
    Line,
    Region,
    SharedLine,
    Space,
)


class Echo:
    """An owner that answers with the offset and writes down what it is told."""

    def __init__(self) -> None:
        self.log: list[tuple[int, ...]] = []

    def read(self, region: int, offset: int, size: int) -> int:
        return (region << 4 | offset) & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        self.log.append((region, offset, value, size))


def port(base: int, length: int, owner: Echo, width: int = 1) -> Region:
    return Region(Space.PORT, base, length, owner, 3, width)


def test_an_owner_hears_offsets_and_its_own_numbers_wherever_it_lies() -> None:
    owner = Echo()
    for base in (0, 0x3F8, 0xFFF8):
        bus = Bus()
        bus.claim(port(base, 8, owner))
        assert bus.port_read(base + 5, 1) == 0x35
        bus.claim(Region(Space.MMIO, base << 32, 0x1000, owner, 2))
        assert bus.mmio_read((base << 32) + 6, 1) == 0x26


def test_debug_exit_gets_the_value_of_any_size() -> None:
    bus, values = Bus(), list[int]()
    device = DebugExit(Wires(ManualClock()), debug_exit=values.append)
    bus.claim(Region(Space.PORT, 0xF4, 4, device, 0, 4))
    bus.port_write(0xF4, 1, 0x1FF)
    bus.port_write(0xF4, 4, 0xDEADBEEF)
    assert values == [0xFF, 0xDEADBEEF]
    assert bus.port_read(0xF4, 2) == 0xBEEF


def test_a_wide_access_to_byte_wide_ports_is_split() -> None:
    bus, owner = Bus(), Echo()
    bus.claim(port(0x10, 2, owner))
    assert bus.port_read(0x10, 4) == 0xFFFF3130
    bus.port_write(0x10, 2, 0xABCD)
    assert owner.log == [(3, 0, 0xCD, 1), (3, 1, 0xAB, 1)]
    assert bus.unclaimed == {("port", 0x12): 1, ("port", 0x13): 1}


def test_unclaimed_reads_are_ones_and_are_counted() -> None:
    bus = Bus()
    assert bus.port_read(0xFFFF, 2) == 0xFFFF
    assert bus.mmio_read(0xFED00FFC, 8) == (1 << 64) - 1
    bus.mmio_write(0xFED00FFC, 4, 1)
    bus.port_write(0x80, 1, 1)
    assert bus.unclaimed["mmio", 0xFED00] == 2
    assert bus.unclaimed["port", 0x80] == 1


def test_a_guest_cannot_make_the_bus_grow() -> None:
    bus = Bus()
    bus.port_write(0x80, 1, 1)
    for n in range(3 * PAGES_KEPT):
        bus.port_read(n, 1)
        bus.port_write(n, 1, 0)
        bus.mmio_read(n << 12, 4)
        bus.mmio_write(n << 12, 8, 0)
    assert len(bus.unclaimed) <= STRAYS_KEPT + 1
    assert bus.unclaimed["port", 0x80] == 3
    assert bus.unclaimed.total() == 12 * PAGES_KEPT + 1
    assert bus.unclaimed[ELSEWHERE] > 0
    assert len(bus._pages) <= PAGES_KEPT


def test_mmio_region_and_an_access_that_crosses_its_end() -> None:
    bus, owner, other = Bus(), Echo(), Echo()
    region = Region(Space.MMIO, 0x1000, 0x2000, owner)
    bus.claim(region)
    bus.claim(Region(Space.MMIO, 0x3000, 0x10, other, 5))
    assert bus.mmio_read(0x2010, 4) == 0x1010
    assert bus.mmio_read(0x2FFE, 4) == 0x5150FFFE
    bus.mmio_write(0x2FFF, 2, 0xAABB)
    assert owner.log == [(0, 0x1FFF, 0xBB, 1)]
    assert other.log == [(5, 0, 0xAA, 1)]
    bus.release(region)
    assert bus.mmio_read(0x2010, 1) == 0xFF
    assert bus.mmio_read(0x3000, 1) == 0x50


def test_a_region_of_terabytes_costs_nothing_but_its_row() -> None:
    bus, owner = Bus(), Echo()
    bus.claim(Region(Space.MMIO, 1 << 44, 1 << 43, owner))
    assert bus.mmio_read((1 << 44) + (1 << 42), 8) == 1 << 42
    bus.mmio_write((3 << 43) - 8, 8, 1 << 63)
    assert owner.log == [(0, (1 << 43) - 8, 1 << 63, 8)]


def test_double_claims_are_refused() -> None:
    bus, owner = Bus(), Echo()
    region = port(0xF4, 4, owner, 4)
    bus.claim(region)
    with pytest.raises(ValueError, match="port 0xf5 is claimed twice"):
        bus.claim(port(0xF5, 1, owner))
    bus.claim(Region(Space.MMIO, 0x1000, 0x1000, owner))
    with pytest.raises(ValueError, match="overlaps mmio 0x1000-0x1fff"):
        bus.claim(Region(Space.MMIO, 0x1FFF, 0x1000, owner))
    with pytest.raises(ValueError, match="outside the 65536 ports"):
        bus.claim(port(0xFFFF, 2, owner))
    bus.release(region)
    bus.claim(region)


def test_line_calls_back_on_changes_only() -> None:
    levels = list[bool]()
    line = Line(levels.append)
    line.raise_()
    line.raise_()
    line.lower()
    line.pulse()
    assert levels == [True, False, True, False]


def test_shared_line_is_up_while_anyone_pulls() -> None:
    levels = list[bool]()
    shared = SharedLine(levels.append)
    a, b = shared.input(), shared.input()
    a.raise_()
    b.raise_()
    a.lower()
    assert levels == [True]
    b.lower()
    assert levels == [True, False]
