"""Entries of paging structures in the manual's words."""

import pytest

from understudy.arch.bits import Bits
from understudy.arch.paging_entry import (
    PDE2M,
    PDE4M,
    PDE32,
    PDPTE1G,
    PTE,
    PTE32,
    EptPage,
    EptTable,
    PdpteRegister,
    Table,
    address,
    words,
)


@pytest.mark.parametrize(
    ("entry", "where", "said"),
    [
        (PTE32(0x1234_5067), 0x1234_5000, "user, read/write, accessed, dirty"),
        (PTE32(0x1234_5981), 0x1234_5000, "supervisor, read-only, global, PAT"),
        (PDE32(0x1234_5FDF), 0x1234_5000,
         "user, read/write, page-level cache disable, page-level write-through"),
        (PDE4M(0x01E0_01C3), 0x01C0_0000,
         "supervisor, read/write, dirty, global, reserved bits 0x200000 set"),
        (PDE4M(0x0040_20E3), 0x1_0040_0000, "supervisor, read/write, accessed, dirty"),
        (PdpteRegister(0x5E01), 0x5000, ""),
        (PdpteRegister(0x5021), 0x5000, "reserved bits 0x20 set"),
        (Table(0x8000_0000_1234_5023), 0x1234_5000,
         "supervisor, read/write, execute-disable, accessed"),
        (Table(0x4000_0000_1234_5023), 0x1234_5000, "supervisor, read/write, accessed"),
        (PTE(1 << 46 | 0x7007), 0x7000, "user, read/write, reserved bits 0x400000000000 set"),
        (PDE2M(0x20_2087), 0x20_0000, "user, read/write, reserved bits 0x2000 set"),
        (PDPTE1G(0x4000_1087), 0x4000_0000, "user, read/write, PAT"),
        (EptTable(0x2107), 0x2000, "read access, write access, execute access, accessed"),
        (EptPage(0x14003B5), 0x140_0000,
         "read access, no write access, execute access, accessed, dirty, write-back"),
        (EptPage(0x5057), 0x5000,
         "read access, write access, execute access, ignore PAT, reserved memory type 2"),
    ],
)  # fmt: skip
def test_words(entry: Bits, where: int, said: str) -> None:
    assert (address(entry), ", ".join(words(entry))) == (where, said)
