"""A guest that makes everything grow that a hypervisor keeps of it.

What: a program that reads ever new pages through tables that lead everywhere, and in between ports
that nobody claims, MSRs that do not exist and addresses without a device; sets timers, and prints.
Source: none.  Invariant: no two rounds of it ask for the same things.
"""

import struct
from typing import Any

from tests.matrix.programs import handle, start
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.vm import VM

MEMORY = 16 << 20
POINTERS, DIRECTORY, TABLES = 0x20_0000, 0x20_1000, 0x40_0000
HOLE = 0xD000_0000  # no RAM, no device
ROUND = 27  # instructions, with those of the handler
STEPS = (0x20_1000, 0x1000, (1 << 30) + 0x1000)  # ever new tables, ever new entries, upper tables

GROW = """
    8a 06                | next: mov al, [rsi]     ; a page that was not read before
    48 01 de             | add rsi, rbx
    41 ff c0             | inc r8d
    41 69 d0 35 9e 00 00 | imul edx, r8d, 0x9e35
    ec                   | in al, dx
    41 69 c8 b1 79 37 9e | imul ecx, r8d, 0x9e3779b1
    0f 32                | rdmsr                   ; #GP(0) nearly always
    b9 e0 06 00 00       | mov ecx, IA32_TSC_DEADLINE
    44 89 c0             | mov eax, r8d
    c1 e0 0c             | shl eax, 12
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    b0 34                | mov al, 0x34            ; the 8254's channel 0 begins anew
    e6 43                | out 0x43, al
    44 88 c0             | mov al, r8b
    e6 40                | out 0x40, al
    e6 40                | out 0x40, al
    66 ba f8 03          | mov dx, 0x3f8
    ee                   | out dx, al
    41 69 f8 b1 79 37 9e | imul edi, r8d, 0x9e3779b1
    c1 ef 06             | shr edi, 6
    81 cf 00 00 00 d0    | or edi, HOLE
    8b 07                | mov eax, [rdi]
    eb b4                | jmp next
"""
SKIP = """
    48 83 44 24 08 02    | add qword [rsp + 8], 2  ; RDMSR and WRMSR have two bytes
    48 83 c4 08          | add rsp, 8
    48 cf                | iretq
"""


def growing(step: int = STEPS[0], memory: int = MEMORY, **options: Any) -> VM:
    """A VM that runs it; each page read lies `step` bytes after the one before."""
    vm = VM(memory, **options)
    start(vm, GROW, rsi=1 << 39, rbx=step, **handle(vm, 13, SKIP))
    lead_everywhere(vm)
    return vm


def lead_everywhere(vm: VM) -> None:
    """Tables for all that lies above the first 512 GBytes, beside those of the loader."""
    entries = [table_entry(n) for n in range(512 * 512)]
    vm.memory.write(TABLES, struct.pack(f"<{len(entries)}Q", *entries))
    tables = [TABLES + (n << 12) | 3 for n in range(512)]
    vm.memory.write(DIRECTORY, struct.pack("<512Q", *tables))
    vm.memory.write(POINTERS, struct.pack("<512Q", *[DIRECTORY | 3] * 512))
    vm.memory.write(PAGE_TABLES_GPA + 8, struct.pack("<255Q", *[POINTERS | 3] * 255))


def table_entry(number: int) -> int:
    """A page of the guest, now and then one without RAM."""
    if number % 8 == 7:
        return HOLE + (number << 12) | 3
    return number * 77 % (MEMORY >> 12) << 12 | 3
