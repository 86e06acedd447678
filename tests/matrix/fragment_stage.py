"""Where random kernel fragments run: tables, handlers and memory that are the same for all of them.

What: 112 KBytes, mapped to themselves page by page: page tables (and a second set, for CR3), GDT,
LDT, TSS, an IDT whose handlers note what they are told and go on with the fragment's next block,
code of the kernel and of a program, data of each, stacks.
Source: SDM 3A, "Protected-Mode Memory Management", "Interrupt and Exception Handling".
Invariant: the same bytes for a mode, always; what differs between fragments is in `fragment_code`.
"""

import struct
from typing import Final

LONG, PAE, TWO_LEVEL, UNPAGED = "64", "pae", "32", "unpaged"
MODES: Final = (LONG, PAE, TWO_LEVEL, UNPAGED)

ROOT, TABLE, SECOND_ROOT = 0x1000, 0x4000, 0x5000
GDT, LDT, IDT, TSS, OTHER_TSS, HANDLERS, LOG = (
    0x9000, 0x9800, 0xA000, 0xB000, 0xB800, 0xC000, 0xD000,
)  # fmt: skip
CODE, PROGRAM, DATA, PROGRAM_DATA, STACK, PROGRAM_STACK, IST, END = (
    0xE000, 0xF000, 0x1_0000, 0x1_4000, 0x1_9F00, 0x1_AF80, 0x1_BF80, 0x1_C000,
)  # fmt: skip
WINDOW: Final = 0x4_0000
"""The page tables can be written that much above themselves, and nowhere else with CR0.WP."""
OTHER_CODE: Final = 0x1_8000  # of every second block, so that one can change how the other is found
BLOCK: Final = 256  # bytes of code, kernel's or program's
BLOCKS: Final = 4  # with that which ends the fragment
STRIDE: Final = 16  # bytes of an entry point
COMMON, INTERRUPTED, CALLED, OVER = range(HANDLERS + 0x800, HANDLERS + 0x1000, 0x200)
MADE_KNOWN: Final = HANDLERS + 0x700
# In the page of notes:
NEXT, BLOCK_NUMBER, NOTES, SAVED, INTERRUPTS = LOG, LOG + 4, LOG + 8, LOG + 0x10, LOG + 0x20
SHORT_GDT, SHORT_IDT, LONG_GDT, LONG_IDT = range(LOG + 0x40, LOG + 0x80, 0x10)
REPEATS, PLACES, FIRST_NOTE = LOG + 0x80, LOG + 0xC0, LOG + 0x100
GO_ON, BACK, BACK_TRAP, KERNELS_OWN, IPI, DEADLINE = 0x20, 0x21, 0x22, 0x23, 0x41, 0x42
"""Vectors: end of a block; a return at once, by both kinds of gates; one that no program may raise;
interrupts of the APIC.
"""

KERNEL_CODE, KERNEL_DATA, CODE32, USER_DATA, USER_CODE, RING1_DATA, TASK = range(0x08, 0x40, 8)
RING1_CODE, LDT_SELECTOR, CALL_GATE, ABSENT, CODE16, CONFORMING, OTHER_TASK = (
    0x98, 0x48, 0x58, 0x68, 0x70, 0x78, 0x80,
)  # fmt: skip
READ_ONLY, EXPAND_DOWN, EXECUTE_ONLY, SMALL, BASED = 0x90, 0xA0, 0xA8, 0xB0, 0xB8
GDT_BYTES: Final = 0xC0
SELECTORS: Final = (
    KERNEL_CODE, KERNEL_DATA, CODE32 | 3, USER_DATA | 3, USER_CODE | 3, RING1_DATA | 1,
    RING1_CODE | 1, TASK, LDT_SELECTOR, CALL_GATE | 3, ABSENT, CODE16, CONFORMING, OTHER_TASK,
    READ_ONLY, EXPAND_DOWN, EXECUTE_ONLY, SMALL, BASED, USER_DATA, KERNEL_DATA | 3, 4, 0xC, 0, 3,
    0x1000, 0xC0,
)  # fmt: skip
ACCESSED: Final = 1 << 5
"""Of entries that lead to code from the beginning: what is translated of it can be kept then."""
DOUBLE_FAULT: Final = 8
FRAME_WORDS: Final = 7
IN_BETWEEN: Final = (1, 2)
"""Vectors that may come between an edit of a page table and what makes it known: they do that."""
WITH_ERROR: Final = (8, 10, 11, 12, 13, 14, 17)


def _descriptor(base: int, limit: int, rights: int) -> int:
    low = limit & 0xFFFF | (base & 0xFFFF) << 16 | (base >> 16 & 0xFF) << 32
    return low | (rights & 0xFF) << 40 | (limit >> 16) << 48 | (rights >> 12) << 52


def _gdt(mode: str) -> bytes:
    is_long = mode == LONG
    kernel, flat = (0xA09B if is_long else 0xC09B), 0xFFFFF
    rows: dict[int, tuple[int, int, int]] = {
        KERNEL_CODE: (0, flat, kernel), KERNEL_DATA: (0, flat, 0xC093), CODE32: (0, flat, 0xC0FB),
        USER_DATA: (0, flat, 0xC0F3), USER_CODE: (0, flat, 0xA0FB if is_long else 0xC0FA),
        RING1_DATA: (0, flat, 0xC0B3), RING1_CODE: (0, flat, 0xA0BB if is_long else 0xC0BB),
        TASK: (TSS, 0x67, 0x8B), LDT_SELECTOR: (LDT, 0xF, 0x82), ABSENT: (0, flat, 0xC013),
        CODE16: (0, 0xFFFF, 0x9B), CONFORMING: (0, flat, kernel | 4), OTHER_TASK:
        (OTHER_TSS, 0x67, 0x89), READ_ONLY: (0, flat, 0xC091), EXPAND_DOWN: (0, 0xF, 0xC097),
        EXECUTE_ONLY: (0, flat, kernel & ~3 | 1), SMALL: (DATA, 0x7FF, 0x4093),
        BASED: (DATA, 0xFFFF, 0x4093),
    }  # fmt: skip
    table = bytearray(GDT_BYTES)
    for selector, row in rows.items():
        struct.pack_into("<Q", table, selector, _descriptor(*row))
    gate = COMMON & 0xFFFF | KERNEL_CODE << 16 | 0xEC00 << 32
    struct.pack_into("<Q", table, CALL_GATE, gate)
    return bytes(table)


def _idt(mode: str) -> bytes:
    out = b""
    for vector in range(0x48):
        dpl = 3 if vector in (3, 4, GO_ON, BACK, BACK_TRAP) else 0
        kind = 0x8F if vector == BACK_TRAP else 0x8E
        at, ist = HANDLERS + vector * STRIDE, 1 if vector == 8 and mode == LONG else 0
        if vector > KERNELS_OWN and vector not in (IPI, DEADLINE):
            kind = 0
        gate = struct.pack("<HHBBH", at & 0xFFFF, KERNEL_CODE, ist, kind | dpl << 5, at >> 16)
        out += gate + bytes(8) if mode == LONG else gate
    return out


def at(mode: str, opcode: str, register: int, address: int) -> bytes:
    """An instruction with this operand in memory; register: or what of its opcode is there."""
    modrm = bytes((register << 3 | 4, 0x25)) if mode == LONG else bytes((register << 3 | 5,))
    return bytes.fromhex(opcode) + modrm + struct.pack("<I", address)


def _common(mode: str) -> bytes:
    """Note the frame and CR2, and go on with the next block."""
    if mode == LONG:
        out = at(mode, "48 89", 0, SAVED) + at(mode, "48 89", 7, SAVED + 8)  # mov [SAVED], rax; rdi
        out += at(mode, "8b", 7, NOTES)  # mov edi, [NOTES]
        for n in range(7):
            out += b"\x58\x48\x89\x47" + bytes((8 * n,))  # pop rax; mov [rdi + 8 n], rax
        out += bytes.fromhex("0f20d0 48894738")  # mov rax, cr2; mov [rdi + 56], rax
    else:
        out = bytes.fromhex("1e 50 b810000000 8ed8 8ec0")  # push ds; push eax; mov ds, es, 10h
        out += at(mode, "89", 7, SAVED + 8) + at(mode, "8b", 7, NOTES)
        for n in range(9):
            out += b"\x58\x89\x47" + bytes((4 * n,))
        out += bytes.fromhex("0f20d0 894724")
    out += b"\x83\xc7\x40" + at(mode, "89", 7, NOTES)  # add edi, 64; mov [NOTES], edi
    return out + b"\xe9" + struct.pack("<i", next_block(mode) - (COMMON + len(out) + 5))


def next_block(mode: str) -> int:
    """Where code that is at level 0 goes on with the next block."""
    return HANDLERS + 0x900


def block(number: int) -> int:
    """Where the kernel's code of a block is."""
    return (OTHER_CODE if number % 2 else CODE) + number * BLOCK


def _next(mode: str) -> bytes:
    out = b""
    if mode != LONG:
        out += bytes.fromhex("b810000000 8ed8 8ec0 8ed0")  # mov eax, 10h; mov ds, es, ss, eax
    out += b"\xbc" + struct.pack("<I", STACK)  # mov esp, STACK
    out += at(mode, "8b", 0, BLOCK_NUMBER) + at(mode, "ff", 0, BLOCK_NUMBER)  # mov eax; inc
    out += b"\x8b\x04\x85" + struct.pack("<I", PLACES)  # mov eax, [4 eax + PLACES]
    return out + b"\xff\xe0"  # jmp eax


def _interrupted(mode: str) -> bytes:
    """Add where it came, and one; end it."""
    end = bytes.fromhex("b90b080000 31c0 31d2 0f30")  # wrmsr X2APIC_EOI
    if mode == LONG:
        out = bytes.fromhex("50 51 52 488b442418")  # push rax, rcx, rdx; mov rax, [rsp + 24]
        out += at(mode, "48 01", 0, INTERRUPTS) + at(mode, "48 ff", 0, INTERRUPTS + 8)
        return out + end + bytes.fromhex("5a 59 58 48cf")
    out = bytes.fromhex("50 51 52 1e b810000000 8ed8 8b442410")
    out += at(mode, "01", 0, INTERRUPTS) + at(mode, "ff", 0, INTERRUPTS + 8)
    return out + end + bytes.fromhex("1f 5a 59 58 cf")


def _handlers(mode: str) -> bytes:
    out = bytearray(0x1000)

    def put(at: int, code: bytes) -> None:
        out[at - HANDLERS : at - HANDLERS + len(code)] = code

    def jump(at: int, to: int) -> bytes:
        return b"\xe9" + struct.pack("<i", to - at - 5)

    for vector in range(0x48):
        at = HANDLERS + vector * STRIDE
        if vector == GO_ON:
            code = jump(at, next_block(mode))
        elif vector in (BACK, BACK_TRAP, KERNELS_OWN):
            code = b"\x48\xcf" if mode == LONG else b"\xcf"
        elif vector in (IPI, DEADLINE):
            code = jump(at, INTERRUPTED)
        else:
            code = b"" if vector in WITH_ERROR else b"\x6a\x00"
            code += bytes((0x6A, vector))
            code += jump(at + len(code), MADE_KNOWN if vector in IN_BETWEEN else COMMON)
        put(at, code)
    reload = bytes.fromhex("50 0f20d8 0f22d8 58")  # push rax; mov rax, cr3; mov cr3, rax; pop rax
    put(MADE_KNOWN, reload + jump(MADE_KNOWN + len(reload), COMMON))
    put(COMMON, _common(mode))
    put(next_block(mode), _next(mode))
    put(OVER, b"\xe6\xf4")  # out 0xf4, al
    put(INTERRUPTED, _interrupted(mode))
    put(CALLED, b"\x48\x0f\x07" if mode == LONG else b"\x0f\x35")  # sysretq, sysexit
    return bytes(out)


def entry_bytes(mode: str) -> int:
    """Of a page table."""
    return 4 if mode == TWO_LEVEL else 8


def _tables(mode: str) -> dict[int, bytes]:
    """Two sets; the second has other frames behind the data."""
    if mode == UNPAGED:
        return {}
    word = "<I" if mode == TWO_LEVEL else "<Q"
    out = {}
    for root, swapped in ((ROOT, 0), (SECOND_ROOT, 1)):
        upper = {LONG: 3, PAE: 2, TWO_LEVEL: 1}[mode]
        at = root
        for level in range(upper):
            following = root + 0x3000 if level == upper - 1 else at + 0x1000
            rights = 1 if mode == PAE and not level else 7 | ACCESSED
            out[at] = struct.pack(word, following | rights)
            at = following
        entries = [0]
        for page in range(1, END >> 12):
            is_program = PROGRAM <= page << 12 < DATA or PROGRAM_DATA <= page << 12 < 0x1_8000
            is_program |= page == PROGRAM_STACK >> 12
            if page << 12 < GDT:  # tables are written through their window
                entries.append(page << 12 | 1 | ACCESSED)
                continue
            frame = page ^ 1 if swapped and DATA <= page << 12 < 0x1_8000 else page
            entries.append(
                frame << 12
                | (7 if is_program else 3)
                | (ACCESSED if page < 0x10 or page == OTHER_CODE >> 12 else 0)
            )
        entries += [0] * ((ROOT + WINDOW >> 12) - len(entries))
        entries += [page << 12 | 3 for page in range(ROOT >> 12, GDT >> 12)]
        out[at] = struct.pack(f"<{len(entries)}{word[1]}", *entries)
    return out


def memory(mode: str) -> bytes:
    """All of it, before a fragment comes."""
    out = bytearray(END)

    def put(at: int, data: bytes) -> None:
        out[at : at + len(data)] = data

    for at, table in _tables(mode).items():
        put(at, table)
    put(GDT, _gdt(mode))
    code = _descriptor(0, 0xFFFFF, 0xC0FA)
    put(LDT, struct.pack("<QQ", _descriptor(0, 0xFFFFF, 0xC0F2), code))
    put(IDT, _idt(mode))
    put(HANDLERS, _handlers(mode))
    for tss in (TSS, OTHER_TSS):
        if mode == LONG:
            put(tss, struct.pack("<IQQQQQ", 0, STACK, STACK, STACK, 0, IST))
        else:
            put(tss, struct.pack("<IIIIIII", 0, STACK, KERNEL_DATA, STACK, RING1_DATA | 1, 0, 0))
    if mode != LONG:  # a task to switch to
        cr3 = 0 if mode == UNPAGED else ROOT
        put(OTHER_TSS + 0x1C, struct.pack("<III", cr3, next_block(mode), 2))
        put(OTHER_TSS + 0x38, struct.pack("<I", STACK))
        segments = (KERNEL_DATA, KERNEL_CODE, KERNEL_DATA, KERNEL_DATA, 0, 0, 0)
        put(OTHER_TSS + 0x48, struct.pack("<7I", *segments))
    size = "<HQ" if mode == LONG else "<HI"
    limits = ((SHORT_GDT, 0x57, GDT), (SHORT_IDT, 0x1FF, IDT), (LONG_GDT, GDT_BYTES - 1, GDT),
              (LONG_IDT, len(_idt(mode)) - 1, IDT))  # fmt: skip
    for at, limit, base in limits:
        put(at, struct.pack(size, limit, base))
    put(BLOCK_NUMBER, struct.pack("<II", 1, FIRST_NOTE))
    places = [block(n) if n < BLOCKS - 1 else OVER for n in range(16)]
    put(PLACES, struct.pack("<16I", *places))
    return bytes(out)


def comparable(now: bytes, mode: str, stack: int | None = None) -> bytes:
    """Memory without the RF that a double fault saves: as it is, and an exit before has set it.

    Where that lies on a kernel's stack nobody knows: then stacks are not compared.  `stack`: of a
    processor that could not deliver it, which may have written a part of the frame there.
    """
    out, word = bytearray(now), 8 if mode == LONG else 4
    if stack is not None:
        for at in range(stack - FRAME_WORDS * word, stack + FRAME_WORDS * word, word):
            if 0 <= at < END - 2:
                out[at + 2] &= ~1
    number, flags = (0, 4) if mode == LONG else (2, 6)
    for at in range(FIRST_NOTE, LOG + 0x1000, 64):
        if out[at + word * number] == DOUBLE_FAULT:
            out[at + word * flags + 2] &= ~1
            out[OTHER_CODE + 0x1000 : END] = bytes(END - OTHER_CODE - 0x1000)
    return bytes(out)


def registers(mode: str) -> dict[str, int]:
    """Those that a fragment does not choose."""
    out = {
        "gdtr_base": GDT, "gdtr_limit": GDT_BYTES - 1, "idtr_base": IDT,
        "idtr_limit": len(_idt(mode)) - 1, "rip": CODE, "rsp": STACK, "cs": KERNEL_CODE,
        "tr": TASK, "tr_base": TSS, "tr_limit": 0x67, "tr_attr": 0x8B, "sysenter_cs": KERNEL_CODE,
        "sysenter_esp": STACK, "sysenter_eip": next_block(mode),
    }  # fmt: skip
    out |= dict.fromkeys(("es", "ss", "ds", "fs", "gs"), KERNEL_DATA)
    if mode == LONG:
        out |= {"efer": 0x501, "fs_base": DATA, "gs_base": DATA + 0x800, "lstar": CALLED,
                "kernel_gs_base": DATA + 0x1800, "fmask": 0x4700,
                "star": CODE32 << 48 | KERNEL_CODE << 32}  # fmt: skip
    return out | ({} if mode == UNPAGED else {"cr3": ROOT})
