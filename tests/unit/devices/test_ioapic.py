"""82093AA: messages, remote IRR, masks, registers."""

import pytest

from understudy.clock import ManualClock
from understudy.devices.ioapic import IoApic, Redirection
from understudy.devices.message import Delivery, Message
from understudy.devices.wires import Wires

LEVEL = 0x8000
MASK = 0x10000


class Bench:
    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.chip = IoApic(Wires(ManualClock(), deliver=self.sent.append))

    def get(self, index: int) -> int:
        self.chip.write(0, 0x000, index, 4)
        return self.chip.read(0, 0x010, 4)

    def put(self, index: int, value: int) -> None:
        self.chip.write(0, 0x000, index, 4)
        self.chip.write(0, 0x010, value, 4)

    def entry(self, pin: int, low: int, high: int = 0) -> None:
        self.put(0x11 + 2 * pin, high)
        self.put(0x10 + 2 * pin, low)


def test_registers_at_reset() -> None:
    b = Bench()
    assert b.get(1) == 0x00170020
    assert [b.get(0x10 + n) for n in range(48)] == [MASK, 0] * 24
    assert b.get(0x40) == 0xFFFFFFFF
    b.put(0, 0xFFFFFFFF)
    assert b.get(0) == b.get(2) == 0x0F000000
    b.put(0x10, 0xFFFFFFFF)
    assert Redirection(b.get(0x10)) == Redirection(MASK=1, TM=1, POL=1, DM=1, DELMOD=7, VEC=0xFF)


def test_edge_messages_carry_the_entry() -> None:
    b = Bench()
    b.entry(4, 0x0931, 0x55000000)
    b.chip.set_input(4, True)
    b.chip.set_input(4, True)
    b.chip.set_input(4, False)
    b.chip.set_input(4, True)
    assert b.sent == [Message(0x31, 0x55, True, Delivery.LOWEST, False)] * 2


def test_an_edge_while_masked_is_lost_a_level_is_not() -> None:
    b = Bench()
    b.chip.set_input(5, True)
    b.entry(5, 0x41)
    assert b.sent == []
    b.entry(5, LEVEL | 0x41)
    assert b.sent == [Message(0x41, 0, level=True)]


def test_level_waits_for_the_eoi_and_comes_again() -> None:
    b = Bench()
    b.entry(9, LEVEL | 0x50)
    b.chip.set_input(9, True)
    b.chip.set_input(9, False)
    b.chip.set_input(9, True)
    assert len(b.sent) == 1 and b.get(0x22) & 0x4000
    b.chip.end_of_interrupt(0x51)
    assert len(b.sent) == 1
    b.chip.write(0, 0x040, 0x50, 4)
    assert len(b.sent) == 2
    b.chip.set_input(9, False)
    b.chip.end_of_interrupt(0x50)
    assert len(b.sent) == 2 and not b.get(0x22) & 0x4000


def test_writes_keep_remote_irr_unless_the_entry_becomes_an_edge() -> None:
    b = Bench()
    b.entry(9, LEVEL | 0x50)
    b.chip.set_input(9, True)
    b.put(0x22, MASK | LEVEL | 0x50)
    assert b.get(0x22) & 0x4000
    b.put(0x22, MASK | 0x50)
    assert not b.get(0x22) & 0x4000


def test_nmi_and_extint_are_edges() -> None:
    b = Bench()
    b.entry(0, LEVEL | 0x700)
    b.chip.set_input(0, True)
    assert b.sent == [Message(0, 0, False, Delivery.EXTINT, False)]
    assert not b.get(0x10) & 0x4000


@pytest.mark.parametrize(("size", "value"), [(1, 0x20), (2, 0x0020), (4, 0x170020), (8, 0x170020)])
def test_reads_of_any_size(size: int, value: int) -> None:
    b = Bench()
    b.chip.write(0, 0x000, 1, 1)
    assert b.chip.read(0, 0x010, size) == value
    assert b.chip.read(0, 0x012, 1) == 0x17
    assert b.chip.read(0, 0x800, size) == 0


def test_msi_address_and_data_make_a_message() -> None:
    assert Message.from_msi(0xFEE05004, 0x8141) == Message(0x41, 5, True, Delivery.LOWEST, True)
