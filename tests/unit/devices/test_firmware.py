"""What firmware leaves: the words that guests look for, and code that resets the machine."""

import struct

from tests.unit.devices.test_pc import Machine
from understudy.arch.memory_map import EXTENDED_BIOS_DATA
from understudy.devices import acpi_tables, firmware
from understudy.devices.pc import SERIAL_PORTS
from understudy.verdict import Stop, StopKind
from understudy.vm import VM


def installed() -> bytearray:
    m = Machine()
    m.pc.install_tables()
    return m.memory


def word(memory: bytes | bytearray, at: int) -> int:
    return int(struct.unpack_from("<H", memory, at)[0])


def test_the_data_area_says_where_base_memory_ends() -> None:
    memory = installed()
    assert word(memory, 0x413) << 10 == word(memory, 0x40E) << 4 == 0x9FC00
    assert memory[0x9FC00] == 1


def test_the_data_area_says_what_there_is() -> None:
    memory = installed()
    assert (word(memory, 0x400), word(memory, 0x402), word(memory, 0x404)) == (0x3F8, 0x2F8, 0)
    assert word(memory, 0x410) == 2 << 9 | 2
    assert word(memory, 0x41A) == word(memory, 0x41C) == word(memory, 0x480)


def test_every_vector_leads_to_an_iret_or_starts_again() -> None:
    memory = installed()
    for n in range(256):
        offset, segment = struct.unpack_from("<HH", memory, 4 * n)
        assert memory[(segment << 4) + offset] == (0xEA if n in (0x18, 0x19) else 0xCF), n


def test_the_last_bytes_are_those_of_a_pc() -> None:
    memory = installed()
    assert memory[0xFFFF0:] == bytes.fromhex("ea5be000f0") + b"11/28/26" + b"\0\xfc\0"


def test_the_pieces_do_not_overlap_and_leave_usable_memory_alone() -> None:
    at = 0
    tables = {acpi_tables.BASE: acpi_tables.build(acpi_tables.Layout(apic_ids=tuple(range(255))))}
    for gpa, data in sorted((firmware.pieces(SERIAL_PORTS) | tables).items()):
        assert gpa >= at, hex(gpa)
        at = gpa + len(data)
        assert at <= 0x500 or EXTENDED_BIOS_DATA <= gpa < at <= 1 << 20


def at_the_reset_vector(deaf: tuple[str, ...] = ()) -> Stop:
    """How a guest ends that jumps to F000:FFF0, if these parts do not hear what they are told."""
    with VM("16M") as vm:
        for name in deaf:
            setattr(vm.pc.parts[name], "restart", lambda: None)  # noqa: B010
        flat = {"cs": 0xF000, "cs_base": 0xF0000, "cs_limit": 0xFFFF, "cs_attr": 0x9B}
        vm.vcpus[0].set_registers({"cr0": 0x10, "rip": 0xFFF0, "rflags": 2} | flat)
        return vm.go(budget=100)


def test_the_reset_vector_resets_by_the_keyboard_controller_or_else_by_the_chipset() -> None:
    assert at_the_reset_vector().kind == StopKind.RESET
    assert at_the_reset_vector(("i8042",)).kind == StopKind.RESET


def test_where_nothing_resets_it_halts() -> None:
    stop = at_the_reset_vector(("i8042", "pci"))
    assert (stop.kind, "IF=0" in stop.detail) == (StopKind.STUCK, True)
