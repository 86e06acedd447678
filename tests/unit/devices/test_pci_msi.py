"""MSI and MSI-X: when a message goes out, when it waits, and what it says."""

import random

import pytest

from tests.unit.devices.pci_bench import MASTER, MEMORY, Bench
from understudy.devices.message import Delivery, Message
from understudy.devices.pci_function import Function

CAP = 0x40
ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14
FIRST = Message(0x40, 2)


# --- MSI ---


class MsiBench(Bench):
    """Eight vectors wanted; the guest's driver has set it up."""

    def __init__(self, *, log2_enabled: int = 3) -> None:
        super().__init__()
        self.put(3, 4, MASTER, 2)
        self.put(3, CAP + 4, 0xFEE02000)
        self.put(3, CAP + 8, 0)
        self.put(3, CAP + 12, 0x0040, 2)
        self.put(3, CAP + 2, log2_enabled << 4 | 1, 2)

    def add(self, function: Function) -> None:
        function.add_msi(8)

    def mask(self, bits: int) -> None:
        self.put(3, CAP + 16, bits)

    @property
    def pending(self) -> int:
        return self.get(3, CAP + 20)


def test_msi_capability_before_anybody_touches_it() -> None:
    b = MsiBench()
    b.pci.reset()
    assert b.get(3, CAP, 1) == 5
    assert b.get(3, CAP + 2, 2) == 0x0186  # 64 bits, masks, 8 vectors wanted, off
    assert not b.function.msi(0) and b.messages == []


def test_msi_replaces_the_low_bits_of_the_data() -> None:
    b = MsiBench()
    assert all(b.function.msi(n) for n in (0, 5, 7))
    assert b.messages == [Message(0x40 | n, 2) for n in (0, 5, 7)]
    few = MsiBench(log2_enabled=1)
    few.function.msi(5)
    assert few.messages == [Message(0x41, 2)]
    all_that_there_are = MsiBench(log2_enabled=6)
    all_that_there_are.function.msi(7)
    assert all_that_there_are.messages == [Message(0x47, 2)]


def test_msi_data_and_address_say_mode_and_destination() -> None:
    b = MsiBench()
    b.put(3, CAP + 4, 0xFEE0F004)
    b.put(3, CAP + 12, 0x8158, 2)
    b.function.msi(0)
    assert b.messages == [Message(0x58, 15, True, Delivery.LOWEST, True)]


def test_a_masked_msi_waits_and_is_sent_once() -> None:
    b = MsiBench()
    b.mask(0b101)
    for n in (0, 0, 2, 1):
        b.function.msi(n)
    assert b.messages == [Message(0x41, 2)] and b.pending == 0b101
    b.mask(0b100)
    assert b.messages == [Message(0x41, 2), FIRST] and b.pending == 0b100
    b.put(3, CAP + 20, 0)  # read-only
    assert b.pending == 0b100
    b.mask(0)
    assert b.messages[-1] == Message(0x42, 2) and len(b.messages) == 3 and b.pending == 0


def test_messages_need_a_bus_master_and_take_the_pin_away() -> None:
    b = MsiBench()
    b.put(3, CAP + 2, 0, 2)
    b.function.set_intx(True)
    assert b.irqs == [(3, True)]
    b.put(3, CAP + 2, 1, 2)
    assert b.irqs[-1] == (3, False)
    b.put(3, 4, 0, 2)
    assert b.function.msi(0) and b.messages == []
    b.put(3, 4, MASTER, 2)
    b.function.msi(0)
    assert b.messages == [FIRST]


def test_a_message_to_elsewhere_is_a_write_to_memory() -> None:
    b = MsiBench()
    b.put(3, CAP + 4, 0x2000)
    b.function.msi(0)
    assert b.messages == [] and b.dma == [(0x18, 0x2000, b"\x40\0\0\0")]
    b.put(3, CAP + 8, 0xFFFFFFFF)
    b.function.msi(0)
    assert len(b.dma) == 1


# --- MSI-X ---


class MsixBench(Bench):
    """70 vectors, so that there are two words of pending bits; enabled, all entries unmasked."""

    def __init__(self) -> None:
        super().__init__()
        self.put(3, 4, MASTER | MEMORY, 2)
        self.table = self.get(3, 0x14)
        for n in range(70):
            self.entry(n, data=0x30 + n)
        self.control(ENABLE)

    def add(self, function: Function) -> None:
        function.add_msix(1, 70)

    def entry(self, n: int, *, data: int, control: int = 0) -> None:
        at = self.table + 16 * n
        self.bus.mmio_write(at, 8, 0xFEE02000)
        self.bus.mmio_write(at + 8, 4, data)
        self.bus.mmio_write(at + 12, 4, control)

    def mask(self, n: int, control: int) -> None:
        self.bus.mmio_write(self.table + 16 * n + 12, 4, control)

    def control(self, value: int) -> None:
        self.put(3, CAP + 2, value, 2)

    @property
    def pending(self) -> int:
        at = self.table + 70 * 16
        return self.bus.mmio_read(at, 8) | self.bus.mmio_read(at + 8, 8) << 64


def test_msix_capability_and_table_after_reset() -> None:
    b = MsixBench()
    b.pci.reset()
    assert b.get(3, CAP, 1) == 0x11
    assert b.get(3, CAP + 2, 2) == 69
    assert b.get(3, CAP + 4) == 1 and b.get(3, CAP + 8) == 70 * 16 | 1
    b.put(3, 4, MEMORY, 2)
    for n in range(70):
        assert b.bus.mmio_read(b.table + 16 * n, 8) == 0
        assert b.bus.mmio_read(b.table + 16 * n + 8, 8) == 1 << 32
    assert b.bus.mmio_read(b.table + 0xFF8, 8) == 0


def test_msix_sends_each_vector_as_its_entry_says() -> None:
    b = MsixBench()
    b.function.msi(0)
    b.function.msi(69)
    assert b.messages == [Message(0x30, 2), Message(0x30 + 69, 2)]


def test_a_masked_entry_waits_and_is_sent_once_when_it_may() -> None:
    b = MsixBench()
    b.mask(69, 1)
    b.function.msi(69)
    b.function.msi(69)
    assert b.messages == [] and b.pending == 1 << 69
    b.bus.mmio_write(b.table + 70 * 16 + 8, 8, 0)  # read-only
    assert b.pending == 1 << 69
    b.mask(69, 0)
    assert b.messages == [Message(0x30 + 69, 2)] and b.pending == 0


def test_the_function_mask_holds_all_vectors_back() -> None:
    b = MsixBench()
    b.control(ENABLE | FUNCTION_MASK)
    b.mask(2, 1)
    for n in (1, 2, 65):
        b.function.msi(n)
    b.mask(3, 0)
    assert b.messages == [] and b.pending == 1 << 1 | 1 << 2 | 1 << 65
    b.control(ENABLE)
    assert b.messages == [Message(0x31, 2), Message(0x30 + 65, 2)] and b.pending == 1 << 2


def test_msix_off_means_the_pin() -> None:
    b = MsixBench()
    b.control(0)
    assert not b.function.msi(0) and b.messages == []
    b.function.set_intx(True)
    assert b.irqs == [(3, True)]
    b.control(ENABLE)
    assert b.irqs[-1] == (3, False)


def test_a_store_across_two_entries_changes_both() -> None:
    b = MsixBench()
    b.mask(0, 1)
    b.function.msi(0)
    b.bus.mmio_write(b.table + 12, 8, 0xFEE05000 << 32)
    b.function.msi(1)
    assert b.messages == [Message(0x30, 2), Message(0x31, 5)]


def test_pending_vectors_survive_a_snapshot() -> None:
    b, other = MsixBench(), MsixBench()
    b.mask(7, 1)
    b.function.msi(7)
    other.pci.load(b.pci.save())
    assert other.pending == 1 << 7
    other.mask(7, 0)
    assert other.messages == [Message(0x37, 2)] and b.messages == []


def test_more_vectors_than_there_can_be() -> None:
    f = Function(vendor=1, device=2, class_code=0)
    with pytest.raises(ValueError, match="power of two up to 32"):
        f.add_msi(3)
    with pytest.raises(ValueError, match="1 to 2048"):
        f.add_msix(0, 2049)
    f.add_msix(0, 2048)
    assert f.bars[0].size == 1 << 16


def test_a_flood_of_vectors_keeps_a_bit_for_each() -> None:
    """Every vector raised, masked, unmasked and rewritten all the time: no more goes than came."""
    b, chance, raised = MsixBench(), random.Random(1), 0
    state = b.function.state
    for _ in range(20_000):
        n = chance.randrange(70)
        match chance.randrange(4):
            case 0 | 1:
                raised += b.function.msi(n)
            case 2:
                b.mask(n, chance.randrange(2))
            case 3 if chance.random() < 0.1:
                b.control(ENABLE | chance.choice((0, FUNCTION_MASK)))
            case _:
                address = chance.choice((0xFEE02000, 0x2000, chance.getrandbits(64)))
                b.bus.mmio_write(b.table + 16 * n, 8, address)
                b.bus.mmio_write(b.table + 16 * n + 8, 4, chance.getrandbits(32))
    assert 0 < b.pending < 1 << 70
    gone = len(b.messages) + len(b.dma)
    assert 1000 < gone <= raised - b.pending.bit_count()
    assert (len(state.pending), len(state.table)) == (16, 70 * 16)
