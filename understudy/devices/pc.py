"""A PC's board: the whole set of devices, wired to each other.

Source: IBM PC AT Technical Reference for ports and interrupt requests; ACPI Specification 6.5 for
what came later.  The board knows addresses and wires, the devices do not.  Processors, local
APICs and memory are outside: the board reaches them through the callables it is given.

Invariants: IRQ n is input n of the 8259 pair and input n of the I/O APIC, except IRQ 0, which is
input 2 there; a board that loads what another of the same make saved behaves the same.
"""

from collections.abc import Callable
from typing import Any

from understudy.clock import NS_PER_SECOND, Clock
from understudy.devices import Device, acpi_tables, pci
from understudy.devices.acpi import Acpi
from understudy.devices.debug_exit import DebugExit
from understudy.devices.i8042 import I8042
from understudy.devices.ioapic import IoApic
from understudy.devices.kvmclock import KvmClock
from understudy.devices.message import Message
from understudy.devices.pic8259 import Pic8259
from understudy.devices.pit8254 import Pit8254
from understudy.devices.rtc import Rtc
from understudy.devices.uart16550 import Uart16550
from understudy.machine.bus import Bus, Line

IRQ_TIMER, IRQ_KEYBOARD, IRQ_COM2, IRQ_COM1, IRQ_RTC = 0, 1, 3, 4, 8
DEFAULT_EPOCH_NS = 1_704_067_200 * NS_PER_SECOND  # 2024-01-01 00:00 UTC: the same in every run
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def cmos_memory(ram_bytes: int) -> dict[int, int]:
    """CMOS RAM as firmware leaves it: how much memory there is (IBM PC AT; later PCs)."""
    low = min(ram_bytes, pci.MMIO_WINDOW.start)
    base = 640
    extended = min(max(low - MIB, 0) // KIB, 0xFFFF)
    above_16m = min(max(low - 16 * MIB, 0) // (64 * KIB), 0xFFFF)
    above_4g = (ram_bytes - low) // (64 * KIB)
    words = {0x15: base, 0x17: extended, 0x30: extended, 0x34: above_16m, 0x5B: above_4g}
    ram = {0x14: 0x02}  # equipment: a numeric coprocessor
    for index, value in words.items():
        ram[index], ram[index + 1] = value & 0xFF, value >> 8 & 0xFF
    ram[0x5D] = above_4g >> 16 & 0xFF
    return ram


class PC:
    """The board.  `bus` answers ports and physical addresses; `devices` has the parts by name."""

    def __init__(
        self,
        clock: Clock,
        write_memory: Callable[[int, bytes], None],
        *,
        power_off: Callable[[], None],
        reset: Callable[[], None],
        debug_exit: Callable[[int], None],
        deliver: Callable[[Message], None],
        extint: Callable[[bool], None],
        com1: Callable[[bytes], None],
        com2: Callable[[bytes], None],
        ram_bytes: int = 256 * MIB,
        vcpus: int = 1,
        epoch_ns: int = DEFAULT_EPOCH_NS,
        high_mmio: range | None = None,
    ) -> None:
        self.clock, self.write_memory = clock, write_memory
        self.board = acpi_tables.Board(vcpus=vcpus, ioapic_id=vcpus, high_mmio=high_mmio)
        self.bus = Bus()
        self.pic = Pic8259(extint)
        self.ioapic = IoApic(deliver)
        self.pit = Pit8254(clock, self.line(IRQ_TIMER))
        self.rtc = Rtc(clock, self.line(IRQ_RTC), epoch_ns=epoch_ns, ram=cmos_memory(ram_bytes))
        self.com1 = Uart16550(0x3F8, self.line(IRQ_COM1), com1)
        self.com2 = Uart16550(0x2F8, self.line(IRQ_COM2), com2)
        self.i8042 = I8042(self.line(IRQ_KEYBOARD), reset)
        self.debug_exit = DebugExit(debug_exit)
        self.pci = pci.Pci(self.bus, reset, self.set_irq)
        self.acpi = Acpi(clock, self.line(acpi_tables.SCI), power_off, self.board.pm_port)
        self.kvmclock = KvmClock(clock, write_memory, epoch_ns=epoch_ns, vcpus=vcpus)
        self.devices: dict[str, Device] = {
            "pic8259": self.pic,
            "ioapic": self.ioapic,
            "pit8254": self.pit,
            "rtc": self.rtc,
            "com1": self.com1,
            "com2": self.com2,
            "i8042": self.i8042,
            "debug_exit": self.debug_exit,
            "pci": self.pci,
            "acpi": self.acpi,
            "kvmclock": self.kvmclock,
        }
        for device in self.devices.values():
            self.bus.attach(device)
        # What firmware sets up: the I/O APIC's ID, and which inputs of the 8259s are levels.
        self.ioapic.state.id = self.board.ioapic_id & 15
        for irq in (acpi_tables.SCI, *pci.PIRQ):
            self.pic.state.slave.elcr |= 1 << irq - 8

    # --- wires ---

    def line(self, irq: int) -> Line:
        """The wire of an interrupt request, for the one device that drives it."""
        pic, ioapic, pin = self.pic.set_input, self.ioapic.set_input, 2 if irq == 0 else irq

        def change(level: bool) -> None:
            pic(irq, level)
            ioapic(pin, level)

        return Line(change)

    def set_irq(self, irq: int, level: bool) -> None:
        """The same for those who do not keep a wire."""
        self.pic.set_input(irq, level)
        self.ioapic.set_input(2 if irq == 0 else irq, level)

    # --- what the processors ask of the board ---

    def acknowledge(self) -> int:
        """Interrupt acknowledge cycle: the 8259 pair's vector."""
        return self.pic.acknowledge()

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC broadcasts the EOI of a level-triggered interrupt."""
        self.ioapic.end_of_interrupt(vector)

    # --- what the VM asks of it ---

    def install_tables(self) -> int:
        """Write the ACPI tables to guest memory; returns the RSDP's gpa."""
        self.write_memory(acpi_tables.BASE, acpi_tables.build(self.board))
        return acpi_tables.BASE

    def save(self) -> dict[str, Any]:
        """All devices, as plain values."""
        return {name: device.save() for name, device in self.devices.items()}

    def load(self, saved: dict[str, Any]) -> None:
        """Become the board that was saved.  ValueError says what does not fit."""
        if saved.keys() != self.devices.keys():
            names = sorted(saved.keys() ^ self.devices.keys())
            raise ValueError(f"snapshot: this board and the saved one differ in {names}")
        for name, device in self.devices.items():
            device.load(saved[name])

    def inspect(self) -> dict[str, Any]:
        """Decoded state of every device, for people."""
        return {name: device.inspect() for name, device in self.devices.items()}
