"""The formats are the manual's, and the walker follows them to the end, whatever they contain."""

import pytest

from understudy.arch import address, paging_formats
from understudy.arch.paging_formats import (
    EPT,
    IA32,
    IA32_PSE,
    LEVEL4,
    LEVEL5,
    PAE,
    PDPTE_RESERVED,
    End,
    Format,
    choose,
    descend,
    frame_of,
)

HIGH = 0xF_C000_0000_0000  # bits 51:46: above MAXPHYADDR
PG, PSE, PAE_BIT, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10


@pytest.mark.parametrize(
    ("form", "reserved"),
    [
        (IA32, [(0, 0), (0, 0)]),
        (IA32_PSE, [(0, 1 << 21), (0, 0)]),
        (PAE, [(0xFFFF_C000_0000_01E6, 0), (HIGH | 0x7FF << 52, HIGH | 0x7FF << 52 | 0x1F_E000),
               (0, HIGH | 0x7FF << 52)]),
        (LEVEL4, [(HIGH | 0x80, 0), (HIGH, HIGH | 0x3FFF_E000), (HIGH, HIGH | 0x1F_E000),
                  (0, HIGH)]),
        (LEVEL5, [(HIGH | 0x80, 0), (HIGH | 0x80, 0), (HIGH, HIGH | 0x3FFF_E000),
                  (HIGH, HIGH | 0x1F_E000), (0, HIGH)]),
        (EPT, [(HIGH | 0xF8, 0), (HIGH | 0x78, HIGH | 0x3FFF_F000), (HIGH | 0x78, HIGH | 0x1F_F000),
               (0, HIGH)]),
    ],
    ids=["ia32", "ia32-pse", "pae", "4-level", "5-level", "ept"],
)  # fmt: skip
def test_reserved_bits_are_the_manuals(form: Format, reserved: list[tuple[int, int]]) -> None:
    """SDM 3A, "Formats of CR3 and Paging-Structure Entries", with MAXPHYADDR = 46."""
    assert address.MAXPHYADDR == 46
    assert [(level.reserved_table, level.reserved_page) for level in form.levels] == reserved


def test_the_reserved_bits_of_a_pdpte_register() -> None:
    assert PDPTE_RESERVED == 0x1E6 | (1 << 64) - (1 << 46)


@pytest.mark.parametrize(
    ("registers", "form", "bits", "pages"),
    [
        ((0, PAE_BIT, LMA), None, 0, ()),
        ((PG, 0, 0), IA32, 32, (12,)),
        ((PG, PSE, 0), IA32_PSE, 32, (12, 22)),
        ((PG, PAE_BIT | PSE, 0), PAE, 32, (12, 21)),
        ((PG, PAE_BIT, LMA), LEVEL4, 48, (12, 21, 30)),
        ((PG, PAE_BIT | LA57, LMA), LEVEL5, 57, (12, 21, 30)),
    ],
)
def test_registers_choose_the_format(
    registers: tuple[int, int, int], form: Format | None, bits: int, pages: tuple[int, ...]
) -> None:
    assert choose(*registers) is form
    if form is not None:
        assert (form.linear_bits, form.pages) == (bits, pages)


def test_an_entry_names_36_or_40_bits_of_a_page() -> None:
    assert frame_of(0x0080_2083 | 0xFF << 13, 22, 4) == 0xFF_0080_0000
    assert frame_of(0x1234_5067, 12, 4) == 0x1234_5000
    assert frame_of(1 << 63 | 0x3FFF_C020_0000 | 0x87, 21, 8) == 0x3FFF_C020_0000


def test_a_descent_says_how_it_ended() -> None:
    memory = {0x1000: 0x2003, 0x2000: 0x3007, 0x3000: 0x20_0087, 0x3008: 0x20_2087, 0x3010: 0x4006}

    def read(at: int, size: int) -> int:
        assert size == 8
        return memory.get(at, 0)

    def end(place: int, rows: tuple[paging_formats.Row, ...] = LEVEL4.rows) -> tuple[int, int, int]:
        how, shift, every, _, path = descend(LEVEL4, rows, read, 0x1000, place)
        return how, shift, len(path) * 10 + (every & 6)

    assert end(0x1234) == (End.PAGE, 21, 30 + 2)  # R/W at every level, U/S not
    assert end(1 << 21) == (End.RESERVED, 21, 30 + 2)
    assert end(1 << 21, LEVEL4.lenient_rows) == (End.PAGE, 21, 30 + 2)
    assert end(2 << 21) == (End.ABSENT, 21, 30 + 2)
    assert end(1 << 39) == (End.ABSENT, 39, 10 + 6)


def test_without_nxe_the_execute_disable_bit_is_reserved() -> None:
    def read(at: int, size: int) -> int:
        return 1 << 63 | 0x1003

    assert descend(LEVEL4, LEVEL4.rows, read, 0, 0)[0] == End.PAGE
    assert descend(LEVEL4, LEVEL4.rows_without_nx, read, 0, 0)[0] == End.RESERVED
    assert IA32.rows_without_nx == IA32.rows
