"""A guest's tables, walked by hand, against an oracle that knows the manual's rules."""

import itertools

import pytest

from understudy.paging.guest_walk import GuestFault, Translation

PG, WP, PAE, PSE = 1 << 31, 1 << 16, 1 << 5, 1 << 4
LMA, NXE = 1 << 10, 1 << 11
NX = 1 << 63
CR3 = 0x1000


class Ram:
    """A flat memory of a megabyte."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def hpa(self, gpa: int) -> int | None:
        return gpa if 0 <= gpa < len(self.bytes) else None

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.bytes[gpa : gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa : gpa + len(data)] = data

    def read_u64(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 8), "little")

    def read_u32(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 4), "little")

    def write_u64(self, gpa: int, value: int) -> None:
        self.write(gpa, value.to_bytes(8, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        self.write(gpa, value.to_bytes(4, "little"))


def four_levels(ram: Ram, flags: list[int]) -> Translation:
    """Tables at 0x1000, 0x2000, …; gva 0x123 maps to 0x9123.  `flags` are added level by level."""
    for level, extra in enumerate(flags):
        target = 0x9000 if level == 3 else CR3 + 0x1000 * (level + 1)
        ram.write_u64(CR3 + 0x1000 * level, target | extra)
    return Translation(PG | WP, CR3, PAE, LMA | NXE)


def test_every_combination_of_rights() -> None:
    """U/S, R/W and NX at two levels, each kind of access, both privileges, both CR0.WP."""
    for upper, lower in itertools.product(range(8), repeat=2):
        for write, fetch in ((0, 0), (1, 0), (0, 1)):
            for cpl, wp in itertools.product((0, 3), (0, WP)):
                ram = Ram()
                flags = [(f & 1) << 1 | (f & 2) << 1 | (f & 4 and NX) | 1 for f in (upper, lower)]
                four_levels(ram, [flags[0], 7, 7, flags[1]])
                translation = Translation(PG | wp, CR3, PAE, LMA | NXE, cpl)
                both = upper & lower
                user, writable, no_execute = both & 2, both & 1, (upper | lower) & 4
                refused = (
                    (cpl == 3 and not user)
                    or (write and not writable and (cpl == 3 or wp))
                    or (fetch and no_execute)
                )
                expected = 1 | write << 1 | (cpl == 3) << 2 | fetch << 4
                try:
                    gpa = translation.gpa(ram, 0x123, write=bool(write), fetch=bool(fetch))
                except GuestFault as fault:
                    assert refused
                    assert (fault.gva, fault.error) == (0x123, expected)
                else:
                    assert not refused
                    assert gpa == 0x9123


def test_accessed_and_dirty_flags_are_set_as_by_the_processor() -> None:
    ram = Ram()
    translation = four_levels(ram, [7, 7, 7, 7])
    translation.gpa(ram, 0, mark=False)
    assert ram.read_u64(0x4000) == 0x9007
    translation.gpa(ram, 0)
    assert [ram.read_u64(CR3 + 0x1000 * n) & 0x60 for n in range(4)] == [0x20] * 4
    translation.gpa(ram, 0, write=True)
    assert [ram.read_u64(CR3 + 0x1000 * n) & 0x60 for n in range(4)] == [0x20] * 3 + [0x60]


@pytest.mark.parametrize("depth", range(4))
def test_a_missing_entry_at_any_level_is_not_present(depth: int) -> None:
    ram = Ram()
    flags = [7, 7, 7, 7]
    flags[depth] = 6
    with pytest.raises(GuestFault) as fault:
        four_levels(ram, flags).gpa(ram, 0x5, write=True)
    assert fault.value.error == 2


def test_large_pages() -> None:
    ram = Ram()
    ram.write_u64(0x1000, 0x2007)
    ram.write_u64(0x2000, 0x4000_0087)
    ram.write_u64(0x2008, 0x3007)
    ram.write_u64(0x3000, 0x60_0087)
    translation = Translation(PG, CR3, PAE, LMA)
    assert translation.gpa(ram, 0x1234_5678) == 0x5234_5678
    assert translation.gpa(ram, 0x4000_0000 + 0x12_3456) == 0x72_3456


def test_ia32_and_pae() -> None:
    ram = Ram()
    ram.write_u32(0x1000 + 4 * 3, 0x2007)
    ram.write_u32(0x2000 + 4 * 5, 0x9007)
    ram.write_u32(0x1000 + 4 * 4, 0x0080_0087 | 1 << 13)  # PSE-36: address bit 32
    gva = 3 << 22 | 5 << 12 | 7
    assert Translation(PG, CR3, 0, 0).gpa(ram, gva) == 0x9007
    assert Translation(PG, CR3, PSE, 0).gpa(ram, 4 << 22 | 9) == 0x1_0080_0009
    pae = Ram()
    pae.write_u64(0x1020 + 8, 0x2001)  # a PDPTE: rights do not matter
    pae.write_u64(0x2000 + 8 * 2, 0x3007)
    pae.write_u64(0x3000 + 8 * 1, 0x9007)
    gva = 1 << 30 | 2 << 21 | 1 << 12 | 3
    assert Translation(PG, 0x1020, PAE, 0, 3).gpa(pae, gva, write=True) == 0x9003


def test_without_paging_linear_is_physical() -> None:
    assert Translation(0, 0, 0, 0).gpa(Ram(), 0x1_0000_1234) == 0x1234


def test_a_table_outside_ram_is_not_present() -> None:
    ram = Ram()
    ram.write_u64(0x1000, 0xF_0000_0000 | 7)
    with pytest.raises(GuestFault):
        Translation(PG, CR3, PAE, LMA).gpa(ram, 0)


@pytest.mark.parametrize("gva", [1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63])
def test_an_address_that_is_not_canonical_is_a_general_protection_fault(gva: int) -> None:
    with pytest.raises(GuestFault) as fault:
        Translation(PG, CR3, PAE, LMA).gpa(Ram(), gva)
    assert (fault.value.vector, fault.value.error) == (13, 0)


def test_reading_goes_page_by_page() -> None:
    ram = Ram()
    translation = four_levels(ram, [7, 7, 7, 7])
    ram.write_u64(0x4008, 0x6007)
    ram.write(0x9FFF, b"a")
    ram.write(0x6000, b"b")
    assert translation.read(ram, 0xFFF, 2) == b"ab"
