"""PCI: configuration mechanism 1, BARs, capabilities, interrupt pins, reset register."""

import pytest

from understudy.devices.pci import MMIO_WINDOW, Function, Pci, irq_of
from understudy.machine.bus import Bus


class Toy:
    """A region that echoes offsets and keeps writes."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int, int]] = []

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return bar << 4 | offset & 15

    def bar_write(self, bar: int, offset: int, value: int, size: int) -> None:
        self.log.append((bar, offset, value, size))


class Bench:
    def __init__(self) -> None:
        self.bus, self.toy = Bus(), Toy()
        self.irqs: list[tuple[int, bool]] = []
        self.resets = 0
        self.pci = Pci(self.bus, self._reset, lambda irq, level: self.irqs.append((irq, level)))
        self.bus.attach(self.pci)
        self.function = Function(vendor=0x1AF4, device=0x1042, class_code=0x018000)
        self.function.add_bar(0, 0x1000, self.toy)
        self.function.add_bar(1, 64, self.toy, is_port=True)
        self.capability = self.function.add_capability(0x09, bytes(14), bytes([0, 0xFF]))
        self.pci.plug(self.function, 3, pin=1)

    def _reset(self) -> None:
        self.resets += 1

    def get(self, device: int, offset: int, size: int = 4) -> int:
        self.bus.port_write(0xCF8, 4, 0x80000000 | device << 11 | offset & 0xFC)
        return self.bus.port_read(0xCFC + (offset & 3), size)

    def put(self, device: int, offset: int, value: int, size: int = 4) -> None:
        self.bus.port_write(0xCF8, 4, 0x80000000 | device << 11 | offset & 0xFC)
        self.bus.port_write(0xCFC + (offset & 3), size, value)


def test_the_host_bridge_and_nothing_else_on_an_empty_slot() -> None:
    b = Bench()
    assert b.get(0, 0) == 0x12378086
    assert b.get(0, 0x0A, 2) == 0x0600
    assert b.get(0, 0x0E, 1) == 0
    assert b.get(1, 0) == 0xFFFFFFFF
    b.bus.port_write(0xCF8, 4, 0x80010000)
    assert b.bus.port_read(0xCFC, 4) == 0xFFFFFFFF
    b.bus.port_write(0xCF8, 4, 0x00000000)
    assert b.bus.port_read(0xCF8, 4) == 0
    assert b.bus.port_read(0xCFC, 4) == 0xFFFFFFFF


def test_sizing_a_bar_and_finding_it_assigned() -> None:
    b = Bench()
    assert b.get(3, 0x10) == MMIO_WINDOW.start
    b.put(3, 0x10, 0xFFFFFFFF)
    assert b.get(3, 0x10) == 0xFFFFF000
    b.put(3, 0x14, 0xFFFFFFFF)
    assert b.get(3, 0x14) == 0xFFFFFFC1
    assert b.get(3, 0x18) == 0


def test_a_bar_answers_where_and_while_it_may() -> None:
    b = Bench()
    assert b.bus.mmio_read(0xC0000005, 1) == 0xFF
    b.put(3, 4, 3, 2)
    assert b.bus.mmio_read(0xC0000005, 1) == 0x05
    b.bus.mmio_write(0xC0000010, 8, 0x1122334455667788)
    assert b.toy.log == [(0, 0x10, 0x1122334455667788, 8)]
    assert b.bus.port_read(0xC000, 1) == 0x10
    b.put(3, 0x10, 0xD0000000)
    assert b.bus.mmio_read(0xC0000005, 1) == 0xFF
    assert b.bus.mmio_read(0xD0000005, 1) == 0x05
    b.put(3, 4, 0, 2)
    assert b.bus.mmio_read(0xD0000005, 1) == 0xFF
    assert b.bus.port_read(0xC000, 1) == 0xFF


def test_a_bar_moved_onto_somebody_else_does_not_answer_and_nothing_breaks() -> None:
    b = Bench()
    b.put(3, 0x14, 0x0CC1)
    b.put(3, 4, 1, 2)
    assert b.get(3, 0) == 0x10421AF4
    b.put(3, 0x14, 0xC101)
    assert b.bus.port_read(0xC100, 1) == 0x10


def test_capability_list() -> None:
    b = Bench()
    assert b.get(3, 6, 2) & 0x10
    assert b.get(3, 0x34, 1) == b.capability == 0x40
    assert b.get(3, 0x40, 2) == 0x0009
    b.put(3, 0x40, 0xFFFFFFFF)
    assert b.get(3, 0x40) == 0xFF000009
    second = b.function.add_capability(0x11, bytes(10))
    assert b.get(3, 0x41, 1) == second == 0x50


def test_interrupt_pin_and_its_switch() -> None:
    b = Bench()
    assert (b.get(3, 0x3C, 1), b.get(3, 0x3D, 1)) == (irq_of(3, 1), 1)
    b.function.set_intx(True)
    assert b.irqs == [(irq_of(3, 1), True)] and b.get(3, 6, 2) & 8
    b.put(3, 4, 0x400, 2)
    assert b.irqs[-1] == (irq_of(3, 1), False)
    b.put(3, 4, 0, 2)
    b.function.set_intx(False)
    assert b.irqs[-1] == (irq_of(3, 1), False) and len(b.irqs) == 4


def test_reset_needs_a_rising_bit_2() -> None:
    b = Bench()
    for value in (0x02, 0x06, 0x06, 0x00, 0x04):
        b.bus.port_write(0xCF9, 1, value)
    assert b.resets == 2
    assert b.bus.port_read(0xCF9, 1) == 0x04


def test_snapshot_brings_the_windows_back() -> None:
    b, other = Bench(), Bench()
    b.put(3, 0x10, 0xD0000000)
    b.put(3, 4, 2, 2)
    other.pci.load(b.pci.save())
    assert other.bus.mmio_read(0xD0000005, 1) == 0x05
    assert other.get(3, 0x10) == 0xD0000000
    other.put(3, 4, 0, 2)
    assert b.get(3, 4, 2) == 2


def test_wrong_plugs_are_refused() -> None:
    b = Bench()
    with pytest.raises(ValueError, match=r"00:03\.0 is taken"):
        b.pci.plug(b.function, 3)
    with pytest.raises(ValueError, match="power of two"):
        b.function.add_bar(2, 100, b.toy)
    with pytest.raises(ValueError, match="snapshot: pci"):
        Bench().pci.load({"state": {}, "alarms": {}, "lines": {}})
