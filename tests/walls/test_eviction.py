"""What a processor keeps of tables that were evicted is gone with them.

What: a guest reads a page, then so many others that the first one's tables are evicted; then the
page means something else: by INVLPG, because its frame has moved, or because the table's frame is
another table by now.  What the guest reads next is what is there now.
Source: SDM 3A, "Invalidation of TLBs and Paging-Structure Caches"; decision 0039.
Invariant: each case fails if eviction does not invalidate (but for vtlb by INVLPG and when a frame
moves: it tells the processor then, whatever there was).
"""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix.programs import start
from tests.walls.growth import MEMORY, TABLES, lead_everywhere, table_entry
from understudy.paging.budget import TABLE_BYTES
from understudy.paging.mirror import Mirror
from understudy.verdict import StopKind
from understudy.vm import VM

SHADOWS = ("vtlb", "eager", "lazy")
ENGINES = ("dbt", "reference")
FIRST = 1 << 39
PAGE_A, PAGE_B = 5, 6  # of the first 2 MBytes there; A is read before, B is not
OTHERS = 70  # times 2 MBytes, of each the page at B's place
BEFORE, AFTER, OF_B = 1, 2, 0x77

PROGRAM = """
    8a 07                | mov al, [rdi]           ; A
    e6 f4                | out 0xf4, al
    8a 06                | next: mov al, [rsi]
    48 01 de             | add rsi, rbx
    ff c9                | dec ecx
    75 f7                | jnz next
    e6 f4                | out 0xf4, al
"""
CHANGES: dict[str, str] = {
    "INVLPG": """
        49 89 10         | mov [r8], rdx           ; A's entry
        0f 01 3f         | invlpg [rdi]
        8a 07            | mov al, [rdi]
        e6 f4            | out 0xf4, al
    """,
    "a frame moves": """
        8a 07            | mov al, [rdi]
        e6 f4            | out 0xf4, al
    """,
    "a table is another": """
        8a 87 00 10 00 00 | mov al, [rdi + 4096]   ; B
        e6 f4            | out 0xf4, al
    """,
}
EXPECTED = {"INVLPG": AFTER, "a frame moves": AFTER, "a table is another": OF_B}


def gpa(page: int) -> int:
    """Where a page of the first 2 MBytes is."""
    return table_entry(page) & -4096


def answer(vm: VM) -> int:
    """What the guest says next."""
    stop = vm.go(budget=10_000)
    assert stop.kind is StopKind.DEBUG_EXIT, stop
    return stop.status


def read_again(change: str, paging: str, engine: str, break_it: Callable[[Any], None]) -> int:
    """What the guest reads after all that."""
    with VM(MEMORY, paging=paging, engine=engine) as vm:
        pages: Any = vm.pages
        pages.limit = 24 * TABLE_BYTES
        break_it(pages)
        vm.processors[0].set_walk_caches(1024, 0)
        vm.memory.write(gpa(PAGE_A), bytes([BEFORE]))
        vm.memory.write(gpa(PAGE_B), bytes([OF_B]))
        after = gpa(PAGE_A) + 4096
        vm.memory.write(after, bytes([AFTER]))
        start(
            vm, PROGRAM + CHANGES[change], rdi=FIRST + PAGE_A * 4096, rcx=OTHERS, rbx=1 << 21,
            rsi=FIRST + (1 << 21) + PAGE_B * 4096, r8=TABLES + 8 * PAGE_A, rdx=after | 3,
        )  # fmt: skip
        lead_everywhere(vm)
        for n in range(1, OTHERS + 1):
            vm.memory.write_u64(TABLES + n * 4096 + 8 * PAGE_B, after | 3)
        assert answer(vm) == BEFORE
        answer(vm)
        assert vm.counts()["evictions"] > 0
        assert vm.inspect(FIRST + PAGE_A * 4096).ours.address is None
        if change == "a frame moves":
            old, new = vm.memory.p2m.lookup(gpa(PAGE_A) >> 12), vm.host.frames.allocate()
            assert old is not None
            vm.host.memory.write(new << 12, struct.pack("<B", AFTER))
            vm.memory.p2m.move(gpa(PAGE_A) >> 12, new)
            vm.host.release(old)
        return answer(vm)


def nothing(pages: Any) -> None:
    """It is as it should be."""


def without_invalidation(pages: Any) -> None:
    """Eviction tells no processor."""
    evict = pages.evict

    def silent(target: int) -> None:
        guest = pages.views[0].guest
        guest.forget = lambda addresses: None
        evict(target)
        del guest.forget
        if isinstance(pages, Mirror):
            pages.tables.take_stale()  # nor does anybody later

    pages.evict = silent


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("paging", SHADOWS)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept(change: str, paging: str, engine: str) -> None:
    assert read_again(change, paging, engine, nothing) == EXPECTED[change]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("paging", SHADOWS)
@pytest.mark.parametrize("change", CHANGES)
def test_it_would_be_noticed(change: str, paging: str, engine: str) -> None:
    is_void = paging == "vtlb" and change != "a table is another"
    found = read_again(change, paging, engine, without_invalidation)
    assert (found == EXPECTED[change]) == is_void
