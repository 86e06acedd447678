"""A guest that has more page tables than it may have memory: it goes on, and so do its neighbors.

What: shadow paging protects each table that it follows, and what is protected so does not go to
the swap file.  Source: docs/reference/overcommit.md.  Counts are asserted.
"""

import struct

import pytest

from tests.matrix import programs as p
from tests.matrix.test_overcommit import made, rounds, walking
from understudy.guests.entry import CODE_64, Entry, long_mode, write_gdt
from understudy.linux import VM
from understudy.paging import Paging

CODE, ROOT, DIRECTORIES, TABLES = 0x10_0000, 0x20_0000, 0x20_2000, 0x22_0000
COUNT = 3000  # tables, of 4 KBytes and for 2 MBytes each
READ_ONE_PAGE_OF_EACH = """
    48 89 df             | begin: mov rdi, rbx
    48 8b 07             | next: mov rax, [rdi]
    48 81 c7 00 00 20 00 | add rdi, 2M
    48 39 cf             | cmp rdi, rcx
    72 f1                | jb next
    eb ec                | jmp begin
"""


def fill(vm: VM) -> None:
    """Page tables without end, and a program that needs them all."""
    memory = vm.memory
    write_gdt(memory, CODE_64)
    memory.write(CODE, p.assemble(READ_ONE_PAGE_OF_EACH))
    memory.write(ROOT, struct.pack("<Q", ROOT + 0x1000 | 3))
    named = [struct.pack("<Q", TABLES + 0x1000 * n | 3) for n in range(COUNT)]
    memory.write(DIRECTORIES, b"".join(named))
    directories = [struct.pack("<Q", DIRECTORIES + 0x1000 * n | 3) for n in range(-(-COUNT // 512))]
    memory.write(ROOT + 0x1000, b"".join(directories))
    memory.write(TABLES, b"".join(struct.pack("<Q", 0x1000 * n | 3) for n in range(512)))
    for n in range(1, COUNT):
        memory.write(TABLES + 0x1000 * n, struct.pack("<Q", CODE | 1))
    entry = long_mode(memory, "test", CODE, rbx=0x20_0000, rcx=COUNT * 0x20_0000)
    vm.enter(Entry(entry.registers | {"cr3": ROOT, "rsp": 0x8_0000}, "test"))


@pytest.mark.parametrize("paging", sorted(set(Paging.ALL) - {"ept"}))
def test_more_page_tables_than_memory(paging: str) -> None:
    with made("12M") as host:
        vm = host.vm("16M", name="tables", table_memory="8M", paging=paging)
        fill(vm)
        other = walking(host, 1)
        assert host.stock.is_on
        host.run(until=lambda: vm.instructions > 9000)
        host.run(until=lambda: rounds(other) > 0)
        assert vm.ended is None
        assert vm.pages.evictions > 1000
        assert host.stock.holdings[vm.memory.p2m].has < 1000
