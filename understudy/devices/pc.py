"""A PC's board: the whole set of devices, wired to each other.

Source: IBM PC AT Technical Reference for ports and interrupt requests; ACPI Specification 6.5 for
what came later.  The rows below say which parts there are, where, and on which wires; the parts
do not know.  Processors and local APICs are outside: the board reaches them through the callables
it is given.

Invariants: IRQ n is input n of the 8259 pair and input n of the I/O APIC, except IRQ 0, which is
input 2 there; a board that loads what another of the same make saved behaves the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

from understudy.clock import NS_PER_SECOND, Clock
from understudy.devices import (
    acpi_hotplug,
    acpi_tables,
    firmware,
    mp_table,
    pci,
    pit8254,
    smbios,
    testdev,
)
from understudy.devices.acpi import Acpi
from understudy.devices.agent import Agent
from understudy.devices.board import Board, Row
from understudy.devices.ioapic import IoApic
from understudy.devices.kvmclock import KvmClock
from understudy.devices.message import Message
from understudy.devices.pci import Pci
from understudy.devices.pic8259 import Pic8259
from understudy.devices.rtc import Rtc
from understudy.devices.uart16550 import Uart16550
from understudy.devices.virtio import rng
from understudy.devices.vmgenid import FIRST, VmGenId
from understudy.machine.physical import PhysicalMemory

SERIAL_PORTS = COM1, COM2 = 0x3F8, 0x2F8
IRQ_TIMER, IRQ_KEYBOARD, IRQ_COM2, IRQ_COM1, IRQ_RTC = 0, 1, 3, 4, 8
AGENT_PORT, HOTPLUG_PORT = 0x5A0, 0x620  # no PC has anything there
DEFAULT_EPOCH_NS = 1_704_067_200 * NS_PER_SECOND  # 2024-01-01 00:00 UTC: the same in every run
HIGH_WINDOW = range(1 << 40, 1 << 41)  # for 64-bit BARs, above all memory
USUAL: dict[str, dict[str, Any]] = {
    "testdev": {"at": (0xE0, 0x2000, 0xFF00_0000), "irq": testdev.REQUESTS},
}
"""Where parts beside those of every board are, if nothing else is said."""
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


class PC(Board):
    """A board with a PC's parts.  `devices` are rows of more parts."""

    def __init__(
        self,
        clock: Clock,
        memory: PhysicalMemory,
        *,
        power_off: Callable[[], None],
        reset: Callable[[], None],
        debug_exit: Callable[[int], None],
        deliver: Callable[[Message], None],
        extint: Callable[[bool], None],
        com1: Callable[[bytes], None],
        com2: Callable[[bytes], None],
        who: Callable[[], int] = lambda: 0,
        ring: Callable[[], None] = lambda: None,
        ram_bytes: int = 256 * MIB,
        apic_ids: tuple[int, ...] = (0,),
        epoch_ns: int = DEFAULT_EPOCH_NS,
        generation: bytes = FIRST,
        entropy: bytes = rng.FIRST,
        high_mmio: range | None = HIGH_WINDOW,
        has_rom: bool = False,
        eject: Callable[[int], None] | None = None,
        devices: Sequence[Row] = (),
    ) -> None:
        super().__init__(clock, memory, deliver=deliver, interrupt=self.set_irq)
        self.has_rom, self.ram_bytes = has_rom, ram_bytes
        # The I/O APIC's number has four bits, and need not differ from local APICs' any more.
        ioapic_id = apic_ids[-1] + 1 & 0xF
        self.layout = acpi_tables.Layout(
            apic_ids=apic_ids, ioapic_id=ioapic_id, high_mmio=high_mmio,
            hotplug_port=None if eject is None else HOTPLUG_PORT,
        )  # fmt: skip
        levels = sum(1 << irq for irq in (acpi_tables.SCI, *pci.PIRQ))
        usual = {**USUAL, "virtio_rng": {"seed": entropy}}
        cmos, layout, event = cmos_memory(ram_bytes), self.layout, acpi_tables.NEW_GENERATION
        rows: tuple[Row, ...] = (
            ("pic8259", {"at": (0x20, 0xA0, 0x4D0), "extint": extint, "levels": levels}),
            ("ioapic", {"at": layout.ioapic_gpa, "id": layout.ioapic_id}),
            ("pit8254", {"at": (0x40, 0x61), "irq": IRQ_TIMER}),
            ("rtc", {"at": 0x70, "irq": IRQ_RTC, "epoch_ns": epoch_ns, "ram": cmos}),
            ("uart16550", {"name": "com1", "at": COM1, "irq": IRQ_COM1, "transmit": com1}),
            ("uart16550", {"name": "com2", "at": COM2, "irq": IRQ_COM2, "transmit": com2}),
            ("i8042", {"at": (0x60, 0x64), "irq": IRQ_KEYBOARD, "restart": reset}),
            ("port92", {"at": 0x92, "restart": reset}),
            ("debug_exit", {"at": 0xF4, "debug_exit": debug_exit}),
            (
                "pci",
                {
                    "at": (0xCF8, layout.ecam_gpa),
                    "irq": pci.PIRQ,
                    "restart": reset,
                    "high_window": high_mmio,
                },
            ),
            ("acpi", {"at": layout.pm_port, "irq": acpi_tables.SCI, "power_off": power_off}),
            ("agent", {"at": AGENT_PORT, "who": who, "ring": ring}),
            ("kvmclock", {"epoch_ns": epoch_ns, "vcpus": len(apic_ids)}),
            (
                "vmgenid",
                {
                    "gpa": layout.generation_gpa,
                    "generation": generation,
                    "notify": lambda: self.part("acpi", Acpi).raise_event(event),
                },
            ),
        )
        if eject is not None:
            raised = acpi_hotplug.HOTPLUGGED
            hotplug = {
                "at": HOTPLUG_PORT, "eject": eject,
                "notify": lambda: self.part("acpi", Acpi).raise_event(raised),
            }  # fmt: skip
            rows = (*rows, ("pci_hotplug", hotplug))
        for part, options in (
            *rows,
            *((part, {**usual.get(part, {}), **own}) for part, own in devices),
        ):
            self.add(part, **options)
        self.pic = self.part("pic8259", Pic8259)
        self.ioapic = self.part("ioapic", IoApic)
        self.com1 = self.part("com1", Uart16550)
        self.com2 = self.part("com2", Uart16550)
        self.pci = self.part("pci", Pci)
        self.acpi = self.part("acpi", Acpi)
        self.agent = self.part("agent", Agent)
        self.kvmclock = self.part("kvmclock", KvmClock)
        self.vmgenid = self.part("vmgenid", VmGenId)

    def set_irq(self, irq: int, level: bool) -> None:
        """An interrupt request's wire ends at both interrupt controllers."""
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
        """Leave what firmware leaves, in memory and in the chips; returns the RSDP's gpa.

        With a ROM that is the business of what is in it.
        """
        if self.has_rom:
            return 0
        uuid = smbios.uuid_of(self.vmgenid.state.generation)
        for part in (
            firmware.pieces(SERIAL_PORTS, self._ticks()),
            smbios.build(self.ram_bytes, len(self.layout.apic_ids), uuid),
            mp_table.build(self.layout),
            {acpi_tables.BASE: acpi_tables.build(self.layout)},
        ):
            for gpa, data in part.items():
                self.memory.write(gpa, data)
        self.vmgenid.install()
        for port, value in firmware.SETTINGS:
            self.bus.port_write(port, 1, value)
        return acpi_tables.BASE

    def _ticks(self) -> int:
        """The time of day as the BIOS counts it, in 65536 ticks of the timer's clock."""
        ns = self.part("rtc", Rtc).time_ns % (24 * 3600 * NS_PER_SECOND)
        return ns * pit8254.HZ // NS_PER_SECOND >> 16
