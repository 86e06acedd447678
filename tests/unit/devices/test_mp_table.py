"""The MultiProcessor table: found as a guest searches for it; it says what the ACPI tables say.

Source: "MultiProcessor Specification" 1.4.
"""

import struct

from tests.unit.devices.test_firmware import installed
from tests.unit.devices.test_smbios import search
from understudy.devices import acpi_tables, mp_table, pci

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(table: bytes) -> list[bytes]:
    found, at = [], 44
    while at < len(table):
        size = SIZES[table[at]]
        found.append(table[at : at + size])
        at += size
    assert at == len(table) and [row[0] for row in found] == sorted(row[0] for row in found)
    return found


def test_it_is_found_and_adds_up() -> None:
    memory = bytes(installed())
    at = search(memory, b"_MP_")
    assert memory[at + 8] == 1 and sum(memory[at : at + 16]) & 0xFF == 0
    (where,) = struct.unpack_from("<I", memory, at + 4)
    signature, length = struct.unpack_from("<4sH", memory, where)
    table = memory[where : where + length]
    assert signature == b"PCMP" and sum(table) & 0xFF == 0
    assert struct.unpack_from("<HI", table, 34) == (len(entries(table)), 0xFEE00000)


def test_processors_and_the_interrupt_controller_are_those_of_the_madt() -> None:
    layout = acpi_tables.Layout(apic_ids=(0, 1, 2, 255, 256), ioapic_id=3)
    rows = entries(mp_table.build(layout)[mp_table.TABLE])
    processors = [row for row in rows if row[0] == 0]
    assert [(row[1], row[3]) for row in processors] == [(0, 3), (1, 1), (2, 1)]
    (controller,) = [row for row in rows if row[0] == 2]
    assert struct.unpack("<BBBBI", controller) == (2, 3, 0x20, 1, 0xFEC00000)


def test_wires_are_those_of_the_board() -> None:
    rows = entries(mp_table.build(acpi_tables.Layout())[mp_table.TABLE])
    buses = {row[1]: row[2:8] for row in rows if row[0] == 1}
    assert buses == {0: b"PCI   ", 1: b"ISA   "}
    wires = {(row[4], row[5]): (row[7], row[2]) for row in rows if row[0] == 3}
    assert wires[1, 0] == (2, 0) and wires[1, 4] == (4, 0) and wires[1, 9] == (9, 0x0D)
    assert wires[0, 5 << 2 | 2] == (pci.irq_of(5, 3), 0x0D)
    assert (1, 2) not in wires and not {(1, irq) for irq in pci.PIRQ} & set(wires)
    local = [(row[1], row[6], row[7]) for row in rows if row[0] == 4]
    assert local == [(3, 0xFF, 0), (1, 0xFF, 1)]  # ExtINT on LINT0, NMI on LINT1, of all
