"""The MultiProcessor table: processors and interrupt wires, for guests without ACPI.

Source: Intel 242016, "MultiProcessor Specification" 1.4: "MP Floating Pointer Structure", "MP
Configuration Table Header", "Base MP Configuration Table Entries".
It says what the ACPI tables say: see `acpi_tables.madt_body` and the routes of its PCI root; but
local APICs beyond 254, for which an entry has no room, are left out.

Invariants: it lies between 0xF0000 and 0xFFFFF, the floating pointer on a boundary of 16, where a
guest searches; both checksums are right; entries are in the order of their types.
"""

import struct

from understudy.devices import acpi_tables, pci
from understudy.devices.checksum import summed

POINTER, TABLE, LIMIT = 0xF_8000, 0xF_8010, 0xF_E000
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
ENABLED, BOOT = 1 << 0, 1 << 1
VECTORED, NMI, EXTINT = 0, 1, 3  # types of interrupts
ACTIVE_HIGH_LEVEL = acpi_tables.ACTIVE_HIGH_LEVEL
PCI_BUS, ISA_BUS = 0, 1
EVERY = 0xFF
LOCAL_APIC_VERSION, IO_APIC_VERSION = 0x14, 0x20
FAMILY_6, FPU_AND_APIC = 6 << 8, 1 << 0 | 1 << 9  # CPUID's, as far as the table must have them


def build(layout: acpi_tables.Layout) -> dict[int, bytes]:
    """The floating pointer and the table, by gpa."""
    entries = _entries(layout)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP", 44 + sum(map(len, entries)), 4, 0, acpi_tables.TABLE_ID, b"PC".ljust(12),
        0, 0, len(entries), layout.lapic_gpa, 0, 0, 0,
    )  # fmt: skip
    table = summed(header + b"".join(entries), 7)
    if TABLE + len(table) > LIMIT:
        raise ValueError(f"a MultiProcessor table of {len(table)} bytes does not fit in its place")
    # In virtual wire mode, and what follows is a table, not one of the default configurations.
    pointer = struct.pack("<4sIBBBBBBBB", b"_MP_", TABLE, 1, 4, 0, 0, 0, 0, 0, 0)
    return {POINTER: summed(pointer, 10), TABLE: table}


def _entries(layout: acpi_tables.Layout) -> list[bytes]:
    rows = [
        struct.pack(
            "<BBBBIIQ", PROCESSOR, apic_id, LOCAL_APIC_VERSION, ENABLED | (0 if number else BOOT),
            FAMILY_6, FPU_AND_APIC, 0,
        )
        for number, apic_id in enumerate(layout.apic_ids)
        if apic_id < EVERY
    ]  # fmt: skip
    rows += [struct.pack("<BB6s", BUS, PCI_BUS, b"PCI   ")]
    rows += [struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   ")]
    rows += [
        struct.pack("<BBBBI", IO_APIC, layout.ioapic_id, IO_APIC_VERSION, 1, layout.ioapic_gpa)
    ]
    wires = [
        (ACTIVE_HIGH_LEVEL, PCI_BUS, device << 2 | pin, pci.irq_of(device, pin + 1))
        for device in range(1, 32)
        for pin in range(4)
    ]
    for irq in range(16):
        if irq not in (2, *pci.PIRQ):  # 2 is the slave's; the others are the PCI bus's
            flags = ACTIVE_HIGH_LEVEL if irq == acpi_tables.SCI else 0
            wires.append((flags, ISA_BUS, irq, irq or 2))
    rows += [
        struct.pack("<BBHBBBB", IO_INTERRUPT, VECTORED, flags, bus, source, layout.ioapic_id, pin)
        for flags, bus, source, pin in wires
    ]
    rows += [
        struct.pack("<BBHBBBB", LOCAL_INTERRUPT, kind, 0, ISA_BUS, 0, EVERY, line)
        for line, kind in enumerate((EXTINT, NMI))
    ]
    return rows
