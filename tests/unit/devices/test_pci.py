"""PCI: both ways to the registers, BARs, capabilities, interrupt pins, DMA, reset."""

import pytest

from tests.unit.devices.pci_bench import ECAM, IO, MASTER, MEMORY, Bench
from understudy.devices.pci import MMIO_WINDOW, free_place
from understudy.devices.pci_function import Bar, Function
from understudy.machine.physical import DmaError

PIN = 3  # INTA# of device 3 is the fourth wire


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
    b.put(3, 4, MEMORY | IO, 2)
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


class Wide(Bench):
    def add(self, function: Function) -> None:
        function.add_bar(0, 1 << 33, self.toy, is_wide=True, is_prefetchable=True)
        function.add_bar(2, 0x1000, self.toy)


def test_a_64_bit_bar_is_sized_in_two_halves_and_lies_above_4_gib() -> None:
    b = Wide(high_window=range(1 << 40, 1 << 41))
    assert (b.get(3, 0x10), b.get(3, 0x14)) == (0x0000000C, 0x100)
    assert b.get(3, 0x18) == MMIO_WINDOW.start
    b.put(3, 4, MEMORY, 2)
    assert b.bus.mmio_read((1 << 40) + (1 << 32) + 7, 1) == 7
    b.put(3, 0x10, 0xFFFFFFFF)
    b.put(3, 0x14, 0xFFFFFFFF)
    assert (b.get(3, 0x10), b.get(3, 0x14)) == (0x0000000C, 0xFFFFFFFE)
    b.put(3, 0x10, 0)
    b.put(3, 0x14, 0x400)
    assert b.bus.mmio_read((1 << 40) + 7, 1) == 0xFF
    assert b.bus.mmio_read((1 << 42) + 7, 1) == 7
    assert b.bus.mmio_read(MMIO_WINDOW.start + 1, 1) == 0x21


def test_a_bar_moved_onto_somebody_else_does_not_answer_and_nothing_breaks() -> None:
    b = Bench()
    b.put(3, 0x14, 0x0CC1)
    b.put(3, 4, IO, 2)
    assert b.get(3, 0) == 0x10421AF4
    b.put(3, 0x14, 0xC101)
    assert b.bus.port_read(0xC100, 1) == 0x10


def test_who_answers_does_not_depend_on_who_came_first() -> None:
    b, other = Bench(), Bench()
    for bench in (b, other):
        bench.function = Function(vendor=1, device=2, class_code=0)
        bench.function.add_bar(3, 0x1000, bench.toy)
        bench.pci.plug(bench.function, 2)
    b.put(3, 0x10, 0xD0000000)
    b.put(3, 4, MEMORY, 2)
    b.put(2, 0x1C, 0xD0000000)
    b.put(2, 4, MEMORY, 2)
    assert b.bus.mmio_read(0xD0000001, 1) == 0x31
    other.pci.load(b.pci.save())
    assert other.bus.mmio_read(0xD0000001, 1) == 0x31
    b.put(2, 4, 0, 2)
    assert b.bus.mmio_read(0xD0000001, 1) == 0x01


def test_capability_list() -> None:
    b = Bench()
    assert b.get(3, 6, 2) & 0x10
    assert b.get(3, 0x34, 1) == 0x40
    assert b.get(3, 0x40, 2) == 0x0009
    b.put(3, 0x40, 0xFFFFFFFF)
    assert b.get(3, 0x40) == 0xFF000009
    f = Function(vendor=1, device=2, class_code=0)
    assert [f.add_capability(9, bytes(14)), f.add_capability(0x11, bytes(10))] == [0x40, 0x50]
    assert f.get(0x41, 1) == 0x50 and f.get(0x51, 1) == 0


class Express(Bench):
    def add(self, function: Function) -> None:
        function.add_extended_capability(3, 1, (0x1122334455667788).to_bytes(8, "little"))
        function.add_extended_capability(0x0B, 1, bytes(8), b"\0\0\0\0\xff")


def test_extended_space_is_there_through_the_memory_window_only() -> None:
    b = Express(is_express=True)
    at = ECAM + (3 << 15)
    assert b.bus.mmio_read(at, 4) == b.get(3, 0) == 0x10421AF4
    assert b.bus.mmio_read(at + 0x42, 2) == 0x0092  # PCI Express capability, version 2
    assert b.bus.mmio_read(at + 0x100, 4) == 0x10C << 20 | 1 << 16 | 3
    assert b.bus.mmio_read(at + 0x104, 8) == 0x1122334455667788
    assert b.bus.mmio_read(at + 0x10C, 4) == 1 << 16 | 0x0B
    b.bus.mmio_write(at + 0x110, 8, (1 << 64) - 1)
    assert b.bus.mmio_read(at + 0x110, 8) == 0xFF_0000_0000
    b.bus.mmio_write(at + 4, 2, MASTER)
    assert b.get(3, 4, 2) == MASTER


def test_nobody_is_in_the_rest_of_the_memory_window() -> None:
    b = Bench()
    b.bus.mmio_write(ECAM + (3 << 15) + 0xFE, 4, 0)
    for offset in (0x100, 0xFE, (3 << 15) + 0x100, (3 << 15) + 0xFE, 1 << 20, (1 << 28) - 4):
        assert b.bus.mmio_read(ECAM + offset, 4) == 0xFFFFFFFF
    assert b.bus.mmio_read(ECAM, 4) == 0x12378086


def test_interrupt_pin_and_its_switch() -> None:
    b = Bench()
    assert (b.get(3, 0x3C, 1), b.get(3, 0x3D, 1)) == (15, 1)
    b.function.set_intx(True)
    assert b.irqs == [(PIN, True)] and b.get(3, 6, 2) & 8
    b.put(3, 4, 0x400, 2)
    assert b.irqs[-1] == (PIN, False)
    b.put(3, 4, 0, 2)
    b.function.set_intx(False)
    assert b.irqs[-1] == (PIN, False) and len(b.irqs) == 4


def test_only_a_bus_master_reaches_memory_and_under_its_own_name() -> None:
    b = Bench()
    with pytest.raises(DmaError, match="bus master"):
        b.function.dma.write(0x1000, b"x")
    with pytest.raises(DmaError, match="bus master"):
        b.function.dma.read(0x1000, 1)
    b.put(3, 4, MASTER, 2)
    b.function.dma.write(0x1000, b"x")
    assert b.dma == [(3 << 3, 0x1000, b"x")]
    assert b.function.dma.read(0, 2) == bytes(2)


def test_reset_register_needs_a_rising_bit_2() -> None:
    b = Bench()
    for value in (0x02, 0x06, 0x06, 0x00, 0x04):
        b.bus.port_write(0xCF9, 1, value)
    assert b.resets == 2
    assert b.bus.port_read(0xCF9, 1) == 0x04


def test_reset_brings_back_what_firmware_set_and_lowers_the_pin() -> None:
    b, fresh = Bench(), Bench()
    b.put(3, 4, MEMORY | MASTER, 2)
    b.put(3, 0x10, 0xD0000000)
    b.function.set_intx(True)
    b.pci.reset()
    assert b.pci.save() == fresh.pci.save()
    assert b.irqs == [(PIN, True), (PIN, False)]
    assert b.bus.mmio_read(0xD0000005, 1) == 0xFF
    b.put(3, 4, MEMORY, 2)
    assert b.bus.mmio_read(0xC0000005, 1) == 0x05


def test_snapshot_brings_the_windows_back() -> None:
    b, other = Bench(), Bench()
    b.put(3, 0x10, 0xD0000000)
    b.put(3, 4, MEMORY, 2)
    other.pci.load(b.pci.save())
    assert other.bus.mmio_read(0xD0000005, 1) == 0x05
    assert other.get(3, 0x10) == 0xD0000000
    other.put(3, 4, 0, 2)
    assert b.get(3, 4, 2) == MEMORY


def test_wrong_plugs_are_refused() -> None:
    b = Bench()
    with pytest.raises(ValueError, match=r"00:03\.0 is taken"):
        b.pci.plug(Function(vendor=1, device=2, class_code=0), 3)
    with pytest.raises(ValueError, match="plugged in"):
        b.function.add_bar(2, 16, b.toy)
    with pytest.raises(ValueError, match="plugged in"):
        b.function.add_msi()
    f = Function(vendor=1, device=2, class_code=0)
    with pytest.raises(ValueError, match="power of two"):
        f.add_bar(2, 100, b.toy)
    f.add_bar(2, 1 << 32, b.toy, is_wide=True)
    for number, is_wide in ((2, False), (3, False), (1, True), (5, True), (6, False)):
        with pytest.raises(ValueError, match="taken, or does not exist"):
            f.add_bar(number, 0x1000, b.toy, is_wide=is_wide)
    with pytest.raises(ValueError, match="no room"):
        f.add_extended_capability(1, 1, b"")
    with pytest.raises(ValueError, match="snapshot: pci"):
        Bench().pci.load({"state": {}, "alarms": {}, "lines": {}})
    with pytest.raises(ValueError, match="other functions"):
        Bench().pci.load(Express(is_express=True).pci.save())


def test_what_was_unplugged_is_gone_and_its_addresses_and_slot_are_free() -> None:
    b = Bench()
    b.put(3, 4, MEMORY | IO, 2)
    b.function.set_intx(True)
    assert b.bus.mmio_read(0xC0000005, 1) == 0x05 and b.irqs == [(PIN, True)]
    b.pci.unplug(3 << 3)
    assert b.irqs == [(PIN, True), (PIN, False)]
    assert (b.get(3, 0), b.bus.mmio_read(0xC0000005, 1)) == (0xFFFFFFFF, 0xFF)
    assert b.bus.port_read(0xC000, 1) == 0xFF and "18" not in b.pci.save()["state"]["functions"]
    other = Function(vendor=1, device=2, class_code=3)
    other.add_bar(0, 0x1000, b.toy)
    b.pci.plug(other, 3, pin=1)
    assert (b.get(3, 0), b.get(3, 0x10)) == (2 << 16 | 1, MMIO_WINDOW.start)
    other.set_intx(True)
    assert b.irqs[2:] == [(PIN, True)]


def toys(b: Bench, *sizes: int) -> Function:
    function = Function(vendor=1, device=2, class_code=3)
    for number, size in enumerate(sizes):
        function.add_bar(number, size, b.toy)
    return function


def test_addresses_are_given_away_above_all_others_and_then_in_the_gaps() -> None:
    window, owner = range(0x1000, 0x5000), Bench().toy
    whole, half = Bar(0x1000, False, False, owner), Bar(0x800, False, False, owner)
    taken: list[tuple[Bar, int]] = [(Bar(0x8000, True, False, owner), 0), (whole, 0x8000)]
    for start in range(0x1000, 0x5000, 0x1000):
        assert free_place(window, whole, taken) == start
        taken.append((whole, start))
    with pytest.raises(ValueError, match="no room"):
        free_place(window, half, taken)
    taken.remove((whole, 0x2000))
    assert free_place(window, half, taken) == 0x2000
    taken.append((half, 0x2000))
    with pytest.raises(ValueError, match="no room for a BAR of 4096 bytes below 0x5000"):
        free_place(window, whole, taken)


def test_what_is_plugged_in_gets_no_address_at_which_another_is_or_will_be() -> None:
    """The guest has moved it, or a snapshot has; after a reset it is where it was."""
    b = Bench()
    first, second, third = (toys(b, 0x1000) for _ in range(3))
    b.pci.plug(first, 4)
    start = b.get(4, 0x10)
    b.put(4, 0x10, start + 0x1000)
    b.pci.plug(second, 5)
    assert b.get(5, 0x10) == start + 0x2000
    saved = b.pci.save()
    b.pci.reset()
    b.pci.plug(third, 6)
    assert (b.get(4, 0x10), b.get(6, 0x10)) == (start, start + 0x3000)
    b.pci.unplug(6 << 3)
    b.pci.load(saved)
    assert b.get(4, 0x10) == start + 0x1000


def test_what_finds_no_room_has_changed_nothing() -> None:
    b = Bench()
    before = b.pci.save()
    with pytest.raises(ValueError, match="no room"):
        b.pci.plug(toys(b, 0x1000, 1 << 31), 4, pin=1)
    assert b.pci.save() == before and b.get(4, 0) == 0xFFFFFFFF
    b.pci.plug(toys(b, 0x1000), 4, pin=1)
    assert b.get(4, 0) == 2 << 16 | 1
