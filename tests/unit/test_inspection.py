"""Both walks of a linear address: every format, every way to end, and what people are shown."""

import json

import pytest

from understudy import inspection
from understudy.inspection import Inspection, Registers, Step, Walk

PG, PSE, PAE = 0x8000_0001, 1 << 4, 1 << 5
LMA = 0x500


class Words(dict[int, int]):
    """Memory of a few words; where there is none reads as zero below 1 MByte, else is no memory."""

    def __call__(self, at: int, size: int) -> int | None:
        return self.get(at, 0) if at < 1 << 20 else None


def walk(registers: Registers, gva: int, memory: Words) -> Walk:
    return inspection.linear("walk", registers, gva, memory, "gpa")


def entries(found: Walk) -> list[tuple[str, int, int | None, int]]:
    return [(s.name, s.number, s.at, s.entry) for s in found.steps]


def test_32_bit_paging() -> None:
    memory = Words({0x1000 + 4 * 0x301: 0x2007, 0x2000 + 4 * 2: 0x5005})
    found = walk(Registers(PG, 0x1018, 0, 0, None), 0xC040_2123, memory)
    assert found.title == "walk: 32-bit paging"
    assert entries(found) == [("PDE", 0x301, 0x1C04, 0x2007), ("PTE", 2, 0x2008, 0x5005)]
    assert (found.address, found.end) == (0x5123, "gpa 0x5123: user, read-only")


@pytest.mark.parametrize(("cr4", "gpa", "levels"), [(PSE, 0x7_0040_2123, 1), (0, 0x123, 2)])
def test_4_mbyte_pages_need_pse(cr4: int, gpa: int, levels: int) -> None:
    """Without CR4.PSE the flag is ignored, and the entry names a table."""
    memory = Words({0x1000 + 4 * 0x300: 0x0040_E083, 0x2008: 1})
    if not cr4:
        memory[0x1C00] = 0x2083
    found = walk(Registers(PG, 0x1000, cr4, 0, None), 0xC000_2123, memory)
    assert (found.address, len(found.steps)) == (gpa, levels)


def test_pae_paging_from_registers_and_from_memory() -> None:
    memory = Words({0x1020 + 24: 0x3001, 0x2000 + 8: 0x20_0083, 0x3000 + 8: 0x40_0083})
    registers = Registers(PG, 0x1020, PAE, 0, (0, 0, 0, 0x2001))
    found = walk(registers, 0xC020_1234, memory)
    assert entries(found) == [("PDPTE", 3, None, 0x2001), ("PDE", 1, 0x2008, 0x20_0083)]
    assert found.address == 0x20_1234
    assert walk(registers._replace(pdptes=None), 0xC020_1234, memory).address == 0x40_1234
    assert walk(registers, 0x1234, memory).end == "not mapped: #PF, P=0 in its error code"


def test_4_level_paging() -> None:
    memory = Words({
        0x1000 + 8 * 511: 0x2003, 0x2000 + 8 * 510: 0x3003, 0x3008: 0x4003,
        0x4010: 0x8000_0000_0000_7003, 0x2000 + 8 * 509: 0x4000_0083,
    })  # fmt: skip
    registers = Registers(PG, 0x1000, PAE, LMA, None)
    found = walk(registers, 0xFFFF_FFFF_8020_2ABC, memory)
    assert [s.name for s in found.steps] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert found.end == "gpa 0x7abc: supervisor, read/write, execute-disable"
    huge = walk(registers, 0xFFFF_FFFF_4123_4567, memory)
    assert (huge.address, huge.steps[-1].meaning) == (
        0x4123_4567, "maps a 1-GByte page at 0x40000000",
    )  # fmt: skip
    assert "not canonical" in walk(registers, 1 << 47, memory).end


def test_without_paging_an_address_is_its_own() -> None:
    found = walk(Registers(1, 0x1000, 0, 0, None), 0x1_2345_6789, Words())
    assert (found.title, found.address) == ("walk: paging is off", 0x2345_6789)


def test_a_table_where_there_is_no_memory() -> None:
    found = walk(Registers(PG, 0x4000_0000, 0, 0, None), 0x1000, Words())
    assert found.end == "the PDE would lie at 0x40000000, where there is no memory"
    assert (found.steps, found.address) == ((), None)


GUEST = Walk("the guest's walk", "CR3 0x1000", (
    Step("PDE", 1, 0x1004, 0x40_0083, "maps a 4-MByte page at 0x400000", ("supervisor",)),
), 0x40_0000, "gpa 0x400000")  # fmt: skip
OURS = Walk("EPT", "EPTP 0x5e", (), None, "not reached")
BOTH = Inspection(0x40_0000, "paging ept", GUEST, OURS)


def test_side_by_side_if_there_is_room() -> None:
    lines = BOTH.text(120).splitlines()
    assert lines[0] == "linear address 0x400000, paging ept"
    assert lines[2] == f"{'the guest' + chr(39) + 's walk':58} | EPT"
    assert lines[4].startswith("PDE[1] at 0x1004: 0x400083 ") and "| not reached" in lines[4]
    narrow = BOTH.text(60).splitlines()
    assert narrow.index("EPT") > narrow.index("gpa 0x400000")
    assert all(len(line) <= width for width in (60, 120) for line in BOTH.text(width).splitlines())


def test_plain_values_and_back() -> None:
    values = json.loads(json.dumps(BOTH.inspect()))
    assert Inspection.of(values) == BOTH
