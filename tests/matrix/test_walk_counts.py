"""A TLB miss in two dimensions takes (g+1)(h+1)-1 references, for every pair of page sizes.

Claim: lecture, "Nested paging"; a guest walk of g levels with an EPT of h levels.  Twenty-four
references where both use pages of 4 KBytes, eight where both use pages of 1 GByte.
"""

import itertools

import pytest

from tests.matrix import programs as p
from understudy.vm import VM

LEVELS = {"4K": 4, "2M": 3, "1G": 2}
RAM = {"4K": "16M", "2M": "16M", "1G": "1G"}
PDPT, PD, PT = 0x3000, 0x30_0000, 0x30_1000  # the PDPT is that of `long_mode`
GVA = {"4K": 1 << 30, "2M": (1 << 30) + (2 << 21), "1G": 2 << 30}
PRESENT, LARGE = 3, 0x80


def map_data(vm: VM, size: str) -> int:
    """Map a page of this size onto the data; returns the gva of its first byte."""
    vm.memory.write_u64(PDPT + 8, PD | PRESENT)
    vm.memory.write_u64(PDPT + 16, LARGE | PRESENT)
    vm.memory.write_u64(PD, PT | PRESENT)
    vm.memory.write_u64(PD + 16, LARGE | PRESENT)
    vm.memory.write_u64(PT, p.DATA | PRESENT)
    return GVA[size] if size == "4K" else GVA[size] + p.DATA


def references(vm: VM) -> dict[str, int]:
    walk = vm.counts()["walk"]
    return {dimension: sum(levels.values()) for dimension, levels in walk.items()}


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(("guest", "host"), list(itertools.product(LEVELS, repeat=2)))
def test_a_miss_takes_as_many_references_as_the_formula_says(
    guest: str, host: str, engine: str
) -> None:
    with VM(RAM[host], engine=engine, largest_page=host) as vm:
        p.start(vm, "90 | nop\n8b 03 | mov eax, [rbx]\n8b 03 | mov eax, [rbx]\n90 | nop\n")
        vm.memory.write(p.DATA, b"\x2a\0\0\0")
        entry = vm.vcpus[0].guest.registers() | {"rbx": map_data(vm, guest)}
        vm.vcpus[0].guest.set_registers(entry)
        vm.go(budget=1)  # the page of the code is in the TLB now
        before = references(vm)
        vm.go(budget=1)
        after = references(vm)
        assert vm.processors[0].gpr(0) == 0x2A
        g, h = LEVELS[guest], LEVELS[host]
        assert after["guest"] - before["guest"] == g
        assert after["host"] - before["host"] == (g + 1) * h
        assert sum(after.values()) - sum(before.values()) == (g + 1) * (h + 1) - 1
        vm.go(budget=1)
        assert references(vm) == after  # a hit takes none
