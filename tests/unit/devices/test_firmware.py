"""What firmware leaves: the words that guests look for, and code that resets the machine."""

import struct

from tests.unit.devices.test_pc import Machine
from understudy.arch.memory_map import EXTENDED_BIOS_DATA
from understudy.clock import NS_PER_SECOND
from understudy.devices import acpi_tables, firmware, mp_table, smbios
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


def test_every_vector_leads_to_an_end_or_starts_again() -> None:
    """The bytes are those of the listing's instructions: jmp far, push (of a handler), iret."""
    memory = installed()
    first = dict.fromkeys(range(256), 0xCF) | {0x18: 0xEA, 0x19: 0xEA, 8: 0x1E}
    first |= dict.fromkeys([*range(9, 16), *range(0x70, 0x78)], 0x50)
    for n in range(256):
        offset, segment = struct.unpack_from("<HH", memory, 4 * n)
        if 0x60 <= n <= 0x66:
            assert (offset, segment) == (0, 0)
        else:
            assert memory[(segment << 4) + offset] == first[n], n
    assert word(memory, 8 * 4) == 0xFEA5


def test_the_chips_are_programmed_as_a_bios_leaves_them() -> None:
    """SeaBIOS, asked by QEMU's monitor, has the same vectors, and masks no more on the master."""
    m = Machine()
    changes: list[bool] = []
    m.pc.pic.output.callback = changes.append
    m.pc.install_tables()
    assert changes == []
    m.pc.pic.output.callback = m.set_extint
    master, slave = m.pc.pic.state.master, m.pc.pic.state.slave
    assert (master.base, slave.base, master.imr, slave.imr) == (0x08, 0x70, 0xF8, 0xFF)
    assert (master.irr, master.isr, slave.irr, m.extint) == (0, 0, 0, False)
    for _ in range(3):
        m.clock.advance(54_925_500)
        assert m.extint and m.pc.acknowledge() == 8
        m.bus.port_write(0x20, 1, 0x20)
    assert m.bus.port_read(0x92, 1) == 2
    assert not m.messages


def test_the_day_begins_with_the_clocks_time() -> None:
    m = Machine()
    m.clock.advance(3600 * NS_PER_SECOND)
    m.pc.install_tables()
    assert struct.unpack_from("<I", m.memory, 0x46C) == (65543,)


def test_the_last_bytes_are_those_of_a_pc() -> None:
    memory = installed()
    assert memory[0xFFFF0:] == bytes.fromhex("ea5be000f0") + b"11/28/26" + b"\0\xfc\0"


def test_the_pieces_do_not_overlap_and_leave_usable_memory_alone() -> None:
    at = 0
    layout = acpi_tables.Layout(apic_ids=tuple(range(255)))
    tables = {acpi_tables.BASE: acpi_tables.build(layout), layout.generation_gpa: bytes(4096)}
    tables |= smbios.build(1 << 40, 255, bytes(16)) | mp_table.build(layout)
    for gpa, data in sorted((firmware.pieces(SERIAL_PORTS) | tables).items()):
        assert gpa >= at, hex(gpa)
        at = gpa + len(data)
        assert at <= 0x500 or EXTENDED_BIOS_DATA <= gpa < at <= 1 << 20


REAL_MODE = {"cs": 0, "cs_base": 0, "cs_limit": 0xFFFF, "cs_attr": 0x9B}
REAL_MODE |= {"ss": 0, "ss_base": 0, "ss_limit": 0xFFFF, "ss_attr": 0x93}


def in_real_mode(code: str, at: int = 0x7C00) -> tuple[Stop, bytes, int]:
    """How this ends, the BIOS data area then, and the time."""
    with VM("16M") as vm:
        vm.memory.write(at, bytes.fromhex(code))
        state = {"cr0": 0x10, "rip": at, "rsp": at, "rflags": 2}
        vm.vcpus[0].set_registers(REAL_MODE | state)
        stop = vm.go(budget=10_000)
        return stop, vm.memory.read(0x400, 0x100), vm.clock.now()


def test_the_timers_interrupt_counts_and_ends_itself() -> None:
    # sti; next: hlt; cmp byte [0x46c], 5; jb next; cli; hlt
    stop, area, now = in_real_mode("fb f4 803e6c0405 72f8 fa f4")
    assert (stop.kind, area[0x6C:0x71]) == (StopKind.STUCK, b"\5\0\0\0\0")
    assert now * 1_193_182 // 65536 // NS_PER_SECOND == 5


def test_midnight_begins_the_count_again() -> None:
    # mov word [0x46c], 0xaf; mov word [0x46e], 0x18; int 8; cli; hlt
    _, area, _ = in_real_mode("c7066c04af00 c7066e041800 cd08 fa f4")
    assert area[0x6C:0x71] == b"\0\0\0\0\1"


def test_port_92_resets_once_its_bit_becomes_1() -> None:
    # in al, 0x92; or al, 1; out 0x92, al; hlt
    assert in_real_mode("e492 0c01 e692 f4")[0].kind == StopKind.RESET
    # mov al, 0; out 0x92, al; in al, 0x92; mov [0x46c], al; cli; hlt
    stop, area, _ = in_real_mode("b000 e692 e492 a26c04 fa f4")
    assert (stop.kind, area[0x6C]) == (StopKind.STUCK, 0)


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
