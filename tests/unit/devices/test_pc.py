"""The board: wires, interrupt messages, power-off and reset, snapshot."""

import json
import struct

from understudy.clock import NS_PER_SECOND, ManualClock
from understudy.devices import acpi_tables
from understudy.devices.acpi_tables import GPE0
from understudy.devices.message import Message
from understudy.devices.pc import PC, cmos_memory
from understudy.devices.pci_function import Function
from understudy.devices.vmgenid import FIRST
from understudy.machine.physical import PhysicalMemory


class Machine(PhysicalMemory):
    """A board with recorders where the processors would be."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.memory = bytearray(1 << 20)
        self.log: list[object] = []
        self.messages: list[Message] = []
        self.extint = False
        self.sent = bytearray()
        self.pc = PC(
            self.clock,
            self,
            power_off=lambda: self.log.append("power off"),
            reset=lambda: self.log.append("reset"),
            debug_exit=self.log.append,
            deliver=self.messages.append,
            extint=self.set_extint,
            com1=self.sent.extend,
            com2=self.sent.extend,
        )
        self.bus = self.pc.bus

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(self.memory[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        if gpa + len(data) > len(self.memory):
            raise IndexError(gpa)
        self.memory[gpa : gpa + len(data)] = data

    def set_extint(self, level: bool) -> None:
        self.extint = level

    def redirect(self, pin: int, entry: int) -> None:
        for half in (1, 0):
            self.bus.mmio_write(0xFEC00000, 4, 0x10 + 2 * pin + half)
            self.bus.mmio_write(0xFEC00010, 4, entry >> 32 * half & 0xFFFFFFFF)


def test_the_timer_is_irq_0_and_input_2() -> None:
    m = Machine()
    m.redirect(2, 3 << 56 | 0x30)
    m.bus.port_write(0x43, 1, 0x34)
    m.bus.port_write(0x40, 1, 0xA9)
    m.bus.port_write(0x40, 1, 0x04)
    m.messages.clear()
    m.clock.advance(NS_PER_SECOND // 100)
    assert len(m.messages) == 10
    assert m.messages[0] == Message(0x30, 3)
    assert m.extint and m.pc.pic.state.master.irr == 1


def test_com1_is_irq_4_and_com2_irq_3() -> None:
    m = Machine()
    for port, irq in ((0x3F8, 4), (0x2F8, 3)):
        m.bus.port_write(port + 4, 1, 0x0B)
        m.bus.port_write(port + 1, 1, 0x01)
        (m.pc.com1 if irq == 4 else m.pc.com2).receive(b"x")
        assert m.pc.pic.state.master.irr >> irq & 1
        assert m.pc.ioapic.state.pins >> irq & 1


def test_the_ways_to_end() -> None:
    m = Machine()
    m.bus.port_write(0x604, 2, 5 << 10 | 1 << 13)
    m.bus.port_write(0xCF9, 1, 0x06)
    m.bus.port_write(0x64, 1, 0xFE)
    m.bus.port_write(0xF4, 1, 7)
    assert m.log == ["power off", "reset", "reset", 7]


def test_the_reset_register_of_the_tables_resets() -> None:
    m = Machine()
    fadt = acpi_tables.fadt_body(m.pc.layout, 0, 0)
    space, bits, _, _, port, value = struct.unpack_from("<BBBBQB", fadt, 116 - 36)
    assert (space, bits) == (1, 8)
    m.bus.port_write(port, 1, value)
    assert m.log == ["reset"]


def test_a_new_generation_is_in_memory_and_raises_the_sci_if_the_guest_wants_it() -> None:
    m = Machine()
    m.redirect(9, 0x8000 | 0x29)
    m.pc.install_tables()
    gpa, pm = m.pc.layout.generation_gpa, m.pc.layout.pm_port
    assert m.memory[gpa : gpa + 16] == FIRST
    m.pc.vmgenid.renew(b"another VM's own")
    assert m.memory[gpa : gpa + 16] == b"another VM's own" and not m.messages
    m.bus.port_write(pm + GPE0 + 2, 1, 1)
    assert m.messages == [Message(0x29, 0, level=True)]
    m.bus.port_write(pm + GPE0, 1, 1)
    m.pc.end_of_interrupt(0x29)
    assert len(m.messages) == 1


def test_power_button_raises_the_sci_until_its_status_is_cleared() -> None:
    m = Machine()
    m.redirect(9, 0x8000 | 0x29)
    m.bus.port_write(0x602, 2, 1 << 8)
    m.pc.acpi.press_power_button()
    assert m.messages == [Message(0x29, 0, level=True)]
    m.pc.end_of_interrupt(0x29)
    assert len(m.messages) == 2
    m.bus.port_write(0x600, 2, 1 << 8)
    m.pc.end_of_interrupt(0x29)
    assert len(m.messages) == 2


def test_the_tables_are_where_a_search_finds_them() -> None:
    m = Machine()
    rsdp = m.pc.install_tables()
    assert 0xE0000 <= rsdp < 0x100000 and rsdp % 16 == 0
    assert m.memory[rsdp : rsdp + 8] == b"RSD PTR "


def test_the_tables_tell_of_the_window_in_which_wide_bars_are_placed() -> None:
    m = Machine()
    m.pc.install_tables()
    edges = struct.pack("<QQ", 1 << 40, (1 << 41) - 1)
    assert edges in m.memory
    function = Function(vendor=1, device=2, class_code=0)
    function.add_bar(0, 1 << 34, m.pc.ioapic, is_wide=True)
    m.pc.pci.plug(function, 5)
    assert function.get(0x10, 8) == 1 << 40 | 4


def test_cmos_tells_the_memory() -> None:
    ram = cmos_memory(5 << 30)
    assert ram[0x34] | ram[0x35] << 8 == (3 * 1024 - 16) * 16
    assert ram[0x5B] | ram[0x5C] << 8 | ram[0x5D] << 16 == 2 * 1024 * 16
    assert cmos_memory(8 << 20)[0x34] == 0


def test_a_snapshot_is_plain_and_continues_the_same() -> None:
    m = Machine()
    m.redirect(2, 0x30)
    m.bus.port_write(0x43, 1, 0x34)
    m.bus.port_write(0x40, 1, 0x10)
    m.bus.port_write(0x40, 1, 0x27)
    m.pc.com1.receive(b"typed")
    m.clock.advance(12_345_678)
    saved = json.loads(json.dumps(m.pc.save()))
    other = Machine()
    other.clock.ns = m.clock.ns
    other.pc.load(saved)
    assert other.pc.save() == m.pc.save()
    m.messages.clear()
    for machine in (m, other):
        machine.clock.advance(50_000_000)
        machine.bus.port_write(0x3FC, 1, 0x0B)
        machine.bus.port_write(0x3F9, 1, 0x01)
    assert m.messages == other.messages != []
    assert m.pc.save() == other.pc.save()
    assert json.dumps(m.pc.inspect()) == json.dumps(other.pc.inspect())
