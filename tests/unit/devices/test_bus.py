"""Bus: dispatch, splitting, unclaimed accesses; lines."""

import pytest

from understudy.devices.debug_exit import DebugExit
from understudy.machine.bus import Bus, Line, SharedLine


def test_debug_exit_gets_the_value_of_any_size() -> None:
    bus, values = Bus(), list[int]()
    bus.attach(DebugExit(values.append))
    bus.port_write(0xF4, 1, 0x1FF)
    bus.port_write(0xF4, 4, 0xDEADBEEF)
    assert values == [0xFF, 0xDEADBEEF]
    assert bus.port_read(0xF4, 2) == 0xBEEF


def test_a_wide_access_to_byte_wide_ports_is_split() -> None:
    bus, log = Bus(), list[tuple[int, int]]()
    bus.claim_ports(range(0x10, 0x12), lambda p, n: p, lambda p, v, n: log.append((p, v)))
    assert bus.port_read(0x10, 4) == 0xFFFF1110
    bus.port_write(0x10, 2, 0xABCD)
    assert log == [(0x10, 0xCD), (0x11, 0xAB)]
    assert bus.unclaimed == {("port", 0x12): 1, ("port", 0x13): 1}


def test_unclaimed_reads_are_ones_and_are_counted() -> None:
    bus = Bus()
    assert bus.port_read(0xFFFF, 2) == 0xFFFF
    assert bus.mmio_read(0xFED00FFC, 8) == (1 << 64) - 1
    bus.mmio_write(0xFED00FFC, 4, 1)
    bus.port_write(0x80, 1, 1)
    assert bus.unclaimed["mmio", 0xFED00] == 2
    assert bus.unclaimed["port", 0x80] == 1


def test_mmio_window_and_an_access_that_crosses_its_end() -> None:
    bus, log = Bus(), list[tuple[int, int, int]]()
    bus.claim_mmio(
        range(0x1000, 0x3000), lambda a, n: a & 0xFF, lambda a, n, v: log.append((a, n, v))
    )
    bus.claim_mmio(range(0x3000, 0x3010), lambda a, n: 0x55, lambda a, n, v: None)
    assert bus.mmio_read(0x2010, 4) == 0x10
    assert bus.mmio_read(0x2FFE, 4) == 0x5555FFFE
    bus.mmio_write(0x2FFF, 2, 0xAABB)
    assert log == [(0x2FFF, 1, 0xBB)]
    bus.release_mmio(range(0x1000, 0x3000))
    assert bus.mmio_read(0x2010, 1) == 0xFF
    assert bus.mmio_read(0x3000, 1) == 0x55


def test_double_claims_are_refused() -> None:
    bus = Bus()
    bus.attach(DebugExit(print))
    with pytest.raises(ValueError, match="port 0xf4 is claimed twice"):
        bus.attach(DebugExit(print))
    bus.claim_mmio(range(0x1000, 0x2000), lambda a, n: 0, lambda a, n, v: None)
    with pytest.raises(ValueError, match="overlaps 0x1000-0x1fff"):
        bus.claim_mmio(range(0x1FFF, 0x3000), lambda a, n: 0, lambda a, n, v: None)
    bus.release_ports(range(0xF4, 0xF8))
    bus.attach(DebugExit(print))


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
