"""Random bytes as a kernel of 32 bits: every engine and paging technique makes the same of them.

What: junk, and beginnings of instructions for kernels, run at level 0 with descriptor tables full
of segments, gates and tasks, with paging off, with two levels and with PAE.
Source: none.  Invariant: as in test_hostile.
"""

import random
import struct
from typing import Any

import pytest

from tests.matrix.programs import assemble
from tests.matrix.test_hostile import (
    BUDGET,
    GUEST_NS,
    JUNK,
    JUNK_BYTES,
    SPICE,
    check_both_engines,
)  # fmt: skip
from tests.matrix.test_task_switch import CODE, DATA, descriptor, gate
from understudy.guests.entry import CR0_ET, CR0_NE, CR0_PE, CR0_PG, Entry, protected_mode
from understudy.paging import Paging
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

SLOW = pytest.mark.slow
SEEDS = [*range(40), *(pytest.param(seed, marks=SLOW) for seed in range(40, 400))]
FEWER = [*range(16), *(pytest.param(seed, marks=SLOW) for seed in range(16, 200))]
TECHNIQUES = sorted(Paging.ALL)
RF = 1 << 16
GDT, IDT, LDT, TSS_A, TSS_B, TSS_16 = 0x1000, 0x2000, 0x2800, 0x3000, 0x3100, 0x3200
HANDLER, DIRECTORY, PDPT, DIRECTORY_PAE = 0x5000, 0x1_0000, 0x1_1000, 0x1_2000
STACK = 0x60_0000
USER_CODE, USER_DATA, TASK_A, TASK_B, LDT_SELECTOR, TASK_16, CALL_GATE = range(0x20, 0x58, 8)
ABSENT, CODE_16, CONFORMING = 0x58, 0x60, 0x68
SELECTORS = (CODE, DATA, USER_CODE | 3, USER_DATA | 3, TASK_A, TASK_B, LDT_SELECTOR, TASK_16,
             CALL_GATE, ABSENT, CODE_16, CONFORMING, 4, 0xC, 0, 0x1000)  # fmt: skip

# Every exception goes to the next 64 bytes of junk, with fresh segments and stack.
NEXT_JUNK = """
    b8 18 00 00 00       | mov eax, DATA
    8e d8                | mov ds, eax
    8e d0                | mov ss, eax
    bc 00 00 60 00       | mov esp, STACK
    a1 f8 ff 5f 00       | mov eax, [0x5ffff8]
    40                   | inc eax
    a3 f8 ff 5f 00       | mov [0x5ffff8], eax
    c1 e0 06             | shl eax, 6
    25 c0 ff 00 00       | and eax, 0xffc0
    05 00 00 30 00       | add eax, JUNK
    ff e0                | jmp eax
"""


def junk(chance: random.Random) -> bytes:
    """As for 64 bits; far transfers and loads of selectors that exist are more frequent."""
    out = b""
    while len(out) < JUNK_BYTES:
        selector = struct.pack("<H", chance.choice(SELECTORS))
        place = struct.pack("<I", JUNK + chance.randrange(JUNK_BYTES))
        out += chance.choice((
            chance.choice(SPICE) + chance.randbytes(chance.randrange(5)),
            chance.choice(SPICE) + chance.randbytes(chance.randrange(5)),
            chance.choice((b"\xea", b"\x9a")) + place + selector,
            b"\x66\xb8" + selector + b"\x8e" + bytes([0xC0 | chance.choice((0, 2, 3, 4, 5)) << 3]),
            b"\x66\xb8" + selector + b"\x0f\x00" + chance.choice((b"\xd0", b"\xd8", b"\xe0")),
            b"\x68" + selector + b"\0\0\x68" + place + chance.choice((b"\xcb", b"\xcf")),
        ))  # fmt: skip
    return out[:JUNK_BYTES]


def tables(chance: random.Random) -> dict[int, bytes]:
    """Descriptor tables, tasks, page tables: by address."""

    def tss(length: int) -> bytes:
        image = bytearray(length)
        if length > 0x60:
            struct.pack_into("<II", image, 4, STACK - 0x1000, DATA)
            cr3 = chance.choice((DIRECTORY, PDPT))
            struct.pack_into("<III", image, 0x1C, cr3, HANDLER, 2)
            struct.pack_into("<I", image, 0x38, STACK - 0x2000)
            segments = [DATA, CODE, DATA, DATA, chance.choice(SELECTORS), 0]
            struct.pack_into("<6I", image, 0x48, *segments)
            struct.pack_into("<II", image, 0x60, chance.choice((0, LDT_SELECTOR)), 0x68 << 16)
        else:
            struct.pack_into("<HH", image, 0x0E, HANDLER, 2)
            struct.pack_into("<8H", image, 0x12, *[STACK - 0x3000 & 0xFFFF] * 8)
            struct.pack_into("<4H", image, 0x22, DATA, CODE, DATA, DATA)
        return bytes(image)

    call = HANDLER & 0xFFFF | CODE << 16 | (0xEC00 | chance.randrange(4)) << 32
    gdt = [0, 0, descriptor(0, 0xFFFFF, 0xC09A), descriptor(0, 0xFFFFF, 0xC092),
           descriptor(0, 0xFFFFF, 0xC0FA), descriptor(0, 0xFFFFF, 0xC0F2),
           descriptor(TSS_A, 0x67, 0x8B), descriptor(TSS_B, 0x67, 0xE9), descriptor(LDT, 0xF, 0x82),
           descriptor(TSS_16, 0x2B, 0xE1), call, descriptor(0, 0xFFFFF, 0xC012),
           descriptor(0, 0xFFFF, 0x009A), descriptor(0, 0xFFFFF, 0xC09E)]  # fmt: skip
    idt = b""
    for vector in range(256):
        kind = chance.choice((0x8E, 0x8F, 0xEE, 0x8E, 0x8E, 0x86))
        is_task = vector == 8 or chance.random() < 0.05
        idt += gate(TASK_B, 0, 0xE5) if is_task else gate(CODE, HANDLER, kind)
    rights = chance.choice((0x83, 0x87))
    large = [i << 22 | rights for i in range(4)]
    pae = [i << 21 | rights for i in range(8)]
    return {
        GDT: struct.pack(f"<{len(gdt)}Q", *gdt),
        IDT: idt,
        LDT: struct.pack("<QQ", descriptor(0, 0xFFFFF, 0xC092), descriptor(JUNK, 0xFFFF, 0x40FA)),
        TSS_A: tss(0x68),
        TSS_B: tss(0x68),
        TSS_16: tss(0x2C),
        HANDLER: assemble(NEXT_JUNK),
        DIRECTORY: struct.pack("<4I", *large).ljust(4096, b"\0"),
        PDPT: struct.pack("<4Q", DIRECTORY_PAE | 1, 0, 0, 0),
        DIRECTORY_PAE: struct.pack("<8Q", *pae).ljust(4096, b"\0"),
        JUNK: junk(chance),
    }


def random_kernel(engine: str, seed: int, paging: str = "") -> VM:
    """Without `paging`, the seed chooses."""
    chance = random.Random(seed)
    chosen = chance.choice(TECHNIQUES)
    vm = VM("16M", engine=engine, paging=paging or chosen)
    for at, data in tables(chance).items():
        vm.memory.write(at, data)
    state = dict(protected_mode("test", HANDLER).registers)
    state |= {"gdtr_base": GDT, "gdtr_limit": 0x6F, "idtr_base": IDT, "idtr_limit": 0x7FF}
    state |= {"tr": TASK_A, "tr_base": TSS_A, "tr_limit": 0x67, "tr_attr": 0x8B, "cs": CODE}
    state |= dict.fromkeys(("es", "ss", "ds", "fs", "gs"), DATA)
    paged = CR0_PG | CR0_NE | CR0_ET | CR0_PE | chance.choice((0, 1 << 16))
    state |= chance.choice((
        {},
        {"cr0": paged, "cr3": DIRECTORY, "cr4": 1 << 4},
        {"cr0": paged, "cr3": PDPT, "cr4": 1 << 5},
    ))  # fmt: skip
    for name in ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi"):
        state[name] = chance.getrandbits(chance.choice((8, 23, 32)))
    vm.enter(Entry(state, "test"))
    return vm


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes_as_a_kernel(seed: int) -> None:
    check_both_engines(lambda engine: random_kernel(engine, seed))


def outcome(paging: str, seed: int) -> tuple[Stop, dict[str, Any]]:
    """How a kernel ends under a technique, and all that it can know then."""
    with random_kernel("dbt", seed, paging) as vm:
        stop = vm.go(budget=BUDGET, deadline_ns=GUEST_NS, wall_seconds=60)
        vm.vcpus[0].leave_guest()
        registers = vm.vcpus[0].guest.registers()
        registers["rflags"] &= ~RF  # an exit in the midst of an instruction sets it
        seen: dict[str, Any] = {"end": str(stop).partition("\n")[0]}
        for flags in (TSS_A + 0x24, TSS_B + 0x24):
            # A double fault saves RF as it is, and the fault before it came by way of an exit.
            vm.memory.write_u32(flags, vm.memory.read_u32(flags) & ~RF)
        seen["memory"] = hash(vm.memory.read(0, vm.memory.size))
        return stop, seen | {"instructions": vm.instructions, "now": vm.clock.now()} | registers


@pytest.mark.parametrize("seed", FEWER)
def test_every_technique_makes_the_same_of_it(seed: int) -> None:
    ends = {paging: outcome(paging, seed) for paging in TECHNIQUES}
    assert StopKind.WALL not in {stop.kind for stop, _ in ends.values()}
    expected = ends["ept"][1]
    for paging, (_, seen) in ends.items():
        assert seen == expected, paging
