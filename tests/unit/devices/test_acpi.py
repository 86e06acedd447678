"""ACPI: fixed registers, tables, and the AML builder."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from understudy.clock import NS_PER_SECOND, ManualClock
from understudy.devices import acpi_tables, aml
from understudy.devices.acpi import HALF, PM_HZ, Acpi
from understudy.devices.wires import Wires
from understudy.machine.bus import Line


class Bench:
    def __init__(self) -> None:
        self.clock, self.offs = ManualClock(), 0
        self.line = Line(lambda level: None)
        self.acpi = Acpi(Wires(self.clock, lines=(self.line,)), power_off=self._off)

    def _off(self) -> None:
        self.offs += 1


# --- The registers ---


def test_the_timer_counts_at_its_rate_in_32_bits() -> None:
    b = Bench()
    b.clock.advance(NS_PER_SECOND)
    assert b.acpi.read(0, 8, 4) == PM_HZ
    assert b.acpi.read(0, 8, 2) == PM_HZ & 0xFFFF
    b.acpi.write(0, 8, 0, 4)
    b.clock.advance(1200 * NS_PER_SECOND)
    assert b.acpi.read(0, 8, 4) == PM_HZ * 1201 - (1 << 32)


def test_timer_status_and_interrupt_when_bit_31_changes() -> None:
    b = Bench()
    assert b.acpi.read(0, 0, 2) == 0
    b.acpi.write(0, 2, 1, 2)
    half = -(-HALF * NS_PER_SECOND // PM_HZ)
    assert b.clock.next_deadline() == half
    b.clock.advance(half - 1)
    assert not b.line.level
    b.clock.advance(1)
    assert b.line.level and b.acpi.read(0, 0, 2) == 1
    b.acpi.write(0, 0, 1, 2)
    assert not b.line.level and b.acpi.read(0, 0, 4) == 0x10000
    b.acpi.write(0, 2, 0, 2)
    assert b.clock.next_deadline() is None
    b.clock.advance(half)
    assert b.acpi.read(0, 0, 1) == 1 and not b.line.level


def test_enable_reads_back_byte_by_byte() -> None:
    b = Bench()
    b.acpi.write(0, 2, 0xFF, 1)
    b.acpi.write(0, 3, 0xFF, 1)
    assert b.acpi.read(0, 2, 2) == 0x0721
    b.acpi.write(0, 2, 0, 1)
    assert b.acpi.read(0, 2, 2) == 0x0700


def test_control_always_says_acpi_mode_and_only_s5_powers_off() -> None:
    b = Bench()
    b.acpi.write(0, 4, 0, 2)
    assert b.acpi.read(0, 4, 2) == 1
    b.acpi.write(0, 4, 1 << 10 | 1 << 13, 2)
    b.acpi.write(0, 4, 5 << 10, 2)
    assert b.offs == 0 and b.acpi.read(0, 4, 2) == 5 << 10 | 1
    b.acpi.write(0, 5, 0x34, 1)
    assert b.offs == 1 and b.acpi.read(0, 4, 2) == 5 << 10 | 1


def test_general_purpose_events_are_cleared_by_a_1_and_enabled_byte_by_byte() -> None:
    b = Bench()
    b.acpi.write(0, 14, 0x0001, 2)
    b.acpi.write(0, 15, 0x80, 1)
    assert b.acpi.read(0, 12, 4) == 0x8001_0000
    b.acpi.raise_event(1)
    assert not b.line.level and b.acpi.read(0, 12, 2) == 2
    b.acpi.raise_event(15)
    assert b.line.level and b.acpi.read(0, 13, 1) == 0x80
    b.acpi.write(0, 12, 0xFF, 1)
    assert b.line.level and b.acpi.read(0, 12, 2) == 0x8000
    b.acpi.write(0, 13, 0x80, 1)
    assert not b.line.level and b.acpi.read(0, 12, 4) == 0x8001_0000


# --- The tables ---


def tables(layout: acpi_tables.Layout) -> dict[str, bytes]:
    """The tables found by following the RSDP, as a guest does."""
    image = acpi_tables.build(layout)

    def at(gpa: int) -> bytes:
        offset = gpa - acpi_tables.BASE
        (length,) = struct.unpack_from("<I", image, offset + 4)
        return image[offset : offset + length]

    rsdt, length, xsdt = struct.unpack_from("<IIQ", image, 16)
    assert length == 36 and sum(image[:20]) % 256 == sum(image[:36]) % 256 == 0
    found = {"RSDT": at(rsdt), "XSDT": at(xsdt)}
    assert struct.unpack("<III", at(rsdt)[36:]) == struct.unpack("<QQQ", at(xsdt)[36:])
    for gpa in struct.unpack("<QQQ", at(xsdt)[36:]):
        found[at(gpa)[:4].decode()] = at(gpa)
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    assert facs % 64 == 0
    found["DSDT"] = at(dsdt)
    assert at(facs)[:4] == b"FACS" and len(at(facs)) == 64
    return found


def test_every_checksum_is_right() -> None:
    for name, data in tables(acpi_tables.Layout()).items():
        assert sum(data) % 256 == 0, name


def test_fadt_says_what_the_board_is() -> None:
    fadt = tables(acpi_tables.Layout())["FACP"]
    assert len(fadt) == 276 and fadt[8] == 6
    assert struct.unpack_from("<HI", fadt, 46) == (9, 0)
    assert struct.unpack_from("<I", fadt, 56) == (0x600,)
    assert struct.unpack_from("<I", fadt, 64) == (0x604,)
    assert struct.unpack_from("<I", fadt, 76) == (0x608,)
    assert struct.unpack_from("<I", fadt, 80) == (0x60C,)
    assert fadt[88:94] == bytes((4, 2, 0, 4, 4, 0))
    assert fadt[220:232] == struct.pack("<BBBBQ", 1, 32, 0, 1, 0x60C)
    assert fadt[108] == 0x32
    assert struct.unpack_from("<H", fadt, 109) == (0b111,)
    assert struct.unpack_from("<I", fadt, 112)[0] & (1 << 8 | 1 << 10) == 1 << 8 | 1 << 10
    assert fadt[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, 0xCF9, 6)


def test_madt_lists_processors_and_overrides() -> None:
    body = tables(acpi_tables.Layout(apic_ids=(0, 1, 2), ioapic_id=3))["APIC"][36:]
    assert struct.unpack_from("<II", body) == (0xFEE00000, 1)
    entries, rest = [], body[8:]
    while rest:
        entries.append(rest[: rest[1]])
        rest = rest[rest[1] :]
    assert [e for e in entries if e[0] == 0] == [
        struct.pack("<BBBBI", 0, 8, n, n, 1) for n in range(3)
    ]
    assert [e for e in entries if e[0] == 1] == [struct.pack("<BBBBII", 1, 12, 3, 0, 0xFEC00000, 0)]
    overrides = [struct.unpack("<BBIH", e[2:]) for e in entries if e[0] == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, 0x0D)]


def test_mcfg_says_where_the_configuration_spaces_of_bus_0_are() -> None:
    mcfg = tables(acpi_tables.Layout(ecam_gpa=0xD000_0000))["MCFG"]
    assert mcfg[36:] == struct.pack("<QQHBBI", 0, 0xD000_0000, 0, 0, 0, 0)


def test_no_window_for_bars_covers_the_configuration_spaces() -> None:
    dsdt = tables(acpi_tables.Layout())["DSDT"]
    windows = [
        range(low, high + 1)
        for low, high in (
            struct.unpack_from("<II", dsdt, at + 10)
            for at in range(len(dsdt))
            if dsdt[at : at + 4] == b"\x87\x17\x00\x00"
        )
    ]
    assert windows == [range(0xC000_0000, 0xE000_0000), range(0xF000_0000, 0xFEC0_0000)]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (package acpica-tools) is not here")
@pytest.mark.parametrize(
    "layout",
    [
        acpi_tables.Layout(),
        acpi_tables.Layout(high_mmio=range(1 << 40, 1 << 41)),
        acpi_tables.Layout(hotplug_port=0x620),
    ],
)
def test_the_reference_compiler_reads_the_dsdt_back(
    layout: acpi_tables.Layout, tmp_path: Path
) -> None:
    dsdt = tables(layout)["DSDT"]
    (tmp_path / "dsdt.aml").write_bytes(dsdt)
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(
        ["iasl", "-p", "again", "dsdt.dsl"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "0 Errors, 0 Warnings" in done.stdout
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == dsdt[36:]


# --- AML ---


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 40, "0e0000000000010000"),
    ],
)
def test_integers(value: int, code: str) -> None:
    assert aml.integer(value).hex() == code


def test_names() -> None:
    assert aml.name_string("\\_S5") == b"\\_S5_"
    assert aml.name_string("\\_SB.PCI0") == b"\\\x2e_SB_PCI0"
    assert aml.name_string("A.B.C") == b"\x2f\x03A___B___C___"
    with pytest.raises(ValueError, match="at most 4"):
        aml.name_string("TOOLONG")


def test_eisa_ids() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"


@pytest.mark.parametrize("size", [1, 62, 63, 64, 4000, 5000, 1 << 20])
def test_package_lengths_count_themselves(size: int) -> None:
    code = aml._length(bytes(size))
    extra = code[0] >> 6
    length = code[0] & (0x3F if extra == 0 else 15)
    length |= int.from_bytes(code[1 : 1 + extra], "little") << 4
    assert length == len(code) == size + 1 + extra


def test_strings_and_integers_out_of_range() -> None:
    assert aml.string("ok") == b"\x0dok\0"
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)
