"""Random kernel fragments.

What: between ordinary random instructions everything that a kernel may do and a deprivileged one
may not see done (`fragment_system`), page tables, code that is written, programs and their system
calls, interrupts, faults.  A block that faults is left for the next one.
Source: SDM 2.
Invariant: a translation that a guest has made worse is forgotten before the next block; a store to
code is no repeated one.
"""

import random
import struct
from collections.abc import Callable
from typing import Final

import iced_x86 as iced

from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_code import ROOM, Block, Fragment, Item
from tests.matrix.fragment_stage import LONG, PAE, UNPAGED
from tests.matrix.fragment_system import DATA_PAGES, SHADOWED, STATUS, Drawing
from tests.matrix.instruction_fuzz import instruction

ITEMS: Final = 8
OF_SEGMENTS: Final = frozenset({
    iced.Mnemonic.LAR, iced.Mnemonic.LSL, iced.Mnemonic.VERR, iced.Mnemonic.VERW,
})  # fmt: skip
"""What finds the hypervisor's descriptor tables in a program, which binary translation runs as it
is, on an ISA where that does not trap.  So it must not be expected to be hidden: what a kernel's
LAR finds is, and so is what UMIP keeps from programs.
"""
LEFT_OUT: Final = frozenset({
    iced.Mnemonic.FNSAVE, iced.Mnemonic.FNSTENV, iced.Mnemonic.FXSAVE, iced.Mnemonic.STI,
    iced.Mnemonic.INT,
})  # fmt: skip
"""What stores which code segment the last x87 instruction had is left out: it is that which the
processor had.  STI and INT are made elsewhere.
"""
POPFS: Final = (iced.Mnemonic.POPF, iced.Mnemonic.POPFD, iced.Mnemonic.POPFQ)


class Writer(Drawing):
    """Makes the items of one fragment."""

    def __init__(self, rng: random.Random, mode: str) -> None:
        super().__init__(rng, mode)
        kinds: dict[Callable[[], Item], int] = {
            self.ordinary: 40, self.flags: 10, self.selectors: 6, self.loads: 8, self.tables: 4,
            self.control: 5, self.msrs: 5, self.plain: 8, self.ports: 3, self.debug: 1,
            self.rewrites: 4, self.returns: 3, self.branches: 5, self.raises: 5, self.descends: 4,
        }  # fmt: skip
        if mode != UNPAGED:
            kinds[self.edits] = 8
        self.kinds, self.weights = list(kinds), list(kinds.values())

    def block(self, number: int, most: int, *, is_program: bool) -> Block:
        """Items, as many as fit."""
        self.number, self.is_program, self.is_stepped = number, is_program, False
        out: list[Item] = []
        length = 0
        for _ in range(self.rng.randrange(1, most + 1)):
            item = self.rng.choices(self.kinds, self.weights)[0]()
            length += len(item.code)
            if length > ROOM:
                break
            out.append(item)
        return tuple(out)

    def ordinary(self) -> Item:
        """Any instruction; what it accesses is near if it is anywhere."""
        while True:
            code = instruction(self.rng, self.bits)
            found = iced.Decoder(self.bits, code, ip=0).decode()
            kinds = [found.op_kind(n) for n in range(found.op_count)]
            repeats = found.has_rep_prefix or found.has_repne_prefix
            if repeats and self.is_stepped:  # what RF is in a trap in the midst of it
                continue
            if (
                found.mnemonic in LEFT_OUT
                or _sets_stack(found)
                or (self.is_program and self._is_real(found))
            ):
                continue
            if iced.OpKind.MEMORY in kinds and (
                found.memory_displacement + 0x400 & (1 << 64) - 1 > 0x800 or found.memory_index
            ):
                continue
            if repeats:  # where a repeated store notices that it writes code is nobody's promise
                few, to = self._set(1, self.rng.randrange(20)), self._set(7, self._place())
                code = few + to + self._set(6, self._place()) + code
            self.is_stepped |= found.mnemonic in POPFS  # what lies on the stack may have TF
            return Item(code)

    def _is_real(self, found: iced.Instruction) -> bool:
        """Whether a program would see of the processor what binary translation does not hide."""
        loads = any(
            found.op_kind(n) == iced.OpKind.REGISTER
            and iced.RegisterExt.is_segment_register(found.op_register(n))
            for n in range(found.op_count)
        )
        return loads or found.mnemonic in OF_SEGMENTS

    def plain(self) -> Item:
        """Instructions without operands, or nearly."""
        rng = self.rng
        leaf = rng.choice((0, 1, 7, 0xB, 0xD, 0x4000_0000, 0x8000_0001, 0x8000_0008))
        codes = [
            "0f31", "0f01f9", "31c90f33", "0f01d0", "31c931d2b8030000000f01d1", "0f01f8", "0f01cb",
            "0f01ca", "31c90f01ee", "0f08", "0f09", "0f01c8", "0f01c9", "0f01c1", "0f0b", "cc",
            "f1", "0f05", "0f34", "0f35", "480f35" if self.is_long else "ce", "0f07", "0fae38",
            "9b", "d9e8", "0f28c1", "dbe3", "0fae1e", "f30faec2", "f30faed2", "0f0d08", "0f01c2",
            "0faa",
        ]  # fmt: skip
        if self._chance(5):
            return Item(self._set(0, leaf) + bytes.fromhex("31c90fa2"))
        if self._chance(40):
            return Item(b"\xf4")
        return Item(bytes.fromhex(rng.choice(codes)))

    def ports(self) -> Item:
        """IN, OUT, INS, OUTS of a port that does nothing."""
        rng = self.rng
        if rng.random() < 0.5:
            return Item(bytes.fromhex(rng.choice(("e680", "e480", "66e780", "e580", "e780"))))
        what = rng.choice(("ee", "ec", "ed", "66ef", "6e", "6c", "66 6f", "6d", "f36c", "f36e"))
        where = self._set(6, self._place()) + self._set(7, self._place()) + self._set(1, 3)
        return Item(b"\x66\xba\x80\x00" + where + bytes.fromhex(what))

    def rewrites(self) -> Item:
        """A store to code: to what follows, or to another block."""
        rng = self.rng
        value = rng.choice((0x90, 0xF8, 0xFA, 0xFA, 0x40, rng.randrange(256)))
        if value == SHADOWED[1]:  # not behind a CLI
            value = SHADOWED[0]
        if rng.random() < 0.4:
            page = rng.choice((stage.CODE, stage.OTHER_CODE, stage.PROGRAM))
            at = page + rng.randrange(stage.BLOCK * (stage.BLOCKS - 1))
            return Item(self._mem("c6", 0, at) + bytes((value,)), beyond=at, is_store=True)
        code = self._mem("c6", 0, 0) + bytes((value,))
        return Item(code, len(code) - 5, len(code) + rng.randrange(16), is_store=True)

    def _code(self) -> int:
        """A selector to go to; what fragments are is no 16-bit code."""
        return self.rng.choice([one for one in stage.SELECTORS if one != stage.CODE16])

    def returns(self) -> Item:
        """IRET and far returns to what follows, with flags and sometimes other selectors."""
        rng = self.rng
        cs = self._code() if self._chance(6) else stage.KERNEL_CODE
        if self.is_program or (cs & 3 == 3 and cs & ~3):
            cs = stage.CODE32 | 3
        value = self._flags() & ~0x4100 | 2
        flags = b"\x68" + struct.pack("<I", value & ~0x3000 | 0x200 if cs & 3 == 3 else value)
        to = b"\x68" + struct.pack("<I", cs) + b"\x68" + bytes(4)
        if rng.random() < 0.3 and cs & 3 != 3:
            code = to + (b"\x48\xcb" if self.is_long else b"\xcb")
            return Item(code, 6, len(code))
        if self.is_long:
            ss = self._selector() if self._chance(8) else rng.choice((0, stage.KERNEL_DATA))
            before = b"\x89\xe0\x68" + struct.pack("<I", ss) + b"\x50" + flags
            code = before + to + b"\x48\xcf"
            return Item(code, len(before) + 6, len(code))
        code = flags + to + b"\xcf"
        return Item(code, len(flags) + 6, len(code))

    def branches(self) -> Item:
        """Calls, returns and jumps, direct, by register and by memory, near and far."""
        rng = self.rng
        kind = rng.randrange(7)
        if kind == 0:
            return Item(bytes.fromhex("e802000000 eb01 c3"))
        if kind == 1:
            return Item(b"\x68\0\0\0\0\xc3", 1, 6)
        if kind == 2:
            return Item(b"\xb8\0\0\0\0" + rng.choice((b"\xff\xe0", b"\xff\xd0")), 1, 7)
        if kind == 3:
            code = b"\x68\0\0\0\0" + rng.choice((b"\xff\x24\x24", b"\xff\x14\x24"))
            return Item(code, 1, 8)
        if kind == 4:
            return Item(b"\x68" + struct.pack("<I", rng.choice((0, stage.CODE + 0x100, 0x1_2345)))
                        + b"\xc3")  # fmt: skip
        selector = self._code() if self._chance(3) else stage.KERNEL_CODE
        if self.is_long:
            far = bytes.fromhex(rng.choice(("48ff2c24", "48ff1c24", "ff2c24")))
            code = b"\x68" + struct.pack("<I", selector) + b"\x68\0\0\0\0" + far
            return Item(code, 6, len(code))
        opcode = rng.choice((b"\xea", b"\x9a"))
        return Item(opcode + bytes(4) + struct.pack("<H", selector), 1, 7)

    def raises(self) -> Item:
        """INT n, and interrupts of the APIC: at once, or in a few instructions."""
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            kinds = (stage.BACK, stage.BACK_TRAP, stage.KERNELS_OWN, 3, 4, 0x30, 0x50)
            vector = rng.choice(kinds)
            return Item(bytes((0xCD, vector)))
        if kind < 3:
            vector = b"\xb8" + struct.pack("<I", stage.IPI)
            return Item(self._set(1, 0x83F) + vector + bytes.fromhex("31d20f30"))
        soon = bytes((rng.randrange(1, 40),))
        arm = b"\x0f\x31\x83\xc0" + soon + b"\x83\xd2\0" + self._set(1, 0x6E0) + b"\x0f\x30"
        return Item(arm + (SHADOWED if rng.random() < 0.5 else b""))

    def descends(self) -> Item:
        """To the program's block of the same number."""
        rng, n = self.rng, self.number
        target = stage.PROGRAM + n * stage.BLOCK
        flags = self._flags() & ~0x7100 | 0x202
        stack = self._set(4, stage.PROGRAM_STACK)
        if self.is_long and rng.random() < 0.4:
            return Item(
                stack
                + self._set(1, target)
                + b"\x41\xbb"
                + struct.pack("<I", flags)
                + b"\x48\x0f\x07"
            )
        if not self.is_long and rng.random() < 0.3:
            flagged = b"\x68" + struct.pack("<I", flags) + b"\x9d"
            target_and_stack = self._set(2, target) + self._set(1, stage.PROGRAM_STACK)
            return Item(flagged + target_and_stack + b"\x0f\x35")
        code = stage.CODE32 | 3
        if self.is_long and rng.random() < 0.7:
            code = stage.USER_CODE | 3
        words = (stage.USER_DATA | 3, stage.PROGRAM_STACK, flags, code, target)
        out = b"".join(b"\x68" + struct.pack("<I", word) for word in words)
        return Item(out + (b"\x48\xcf" if self.is_long else b"\xcf"))

    def edits(self) -> Item:
        """Of a page table, and the processor hears of it."""
        rng = self.rng
        if self.is_stepped or self.is_program:  # which has no way to make it known
            return self.ordinary()
        other = stage.block(self.number + 1) >> 12
        page = rng.choice(DATA_PAGES if rng.random() < 0.8 else (stage.PROGRAM >> 12, other))
        size = stage.entry_bytes(self.mode)
        at = stage.TABLE + stage.WINDOW + page * size
        forget = self._mem("0f01", 7, page << 12)
        if self._chance(8):
            forget = b"\x0f\x20\xd8\x0f\x22\xd8"
        kind = rng.randrange(4)
        if kind == 0:
            bit = rng.choice((0xFE, 0xFD, 0xFB, 0xDF, 0xBF, 0x9F))
            return Item(self._mem("80", 4, at) + bytes((bit,)) + forget, is_whole=True)
        if kind == 1:
            bit = rng.choice((1, 2, 4, 7))
            return Item(self._mem("80", 1, at) + bytes((bit,)) + forget, is_whole=True)
        frame = rng.choice(DATA_PAGES)
        if page not in DATA_PAGES and rng.random() < 0.7:
            frame = page  # with other rights
        rights = rng.choice((3, 7, 7, 5, 1, 0, 0x63, 0x67, 0x27))
        out = self._mem("c7", 0, at) + struct.pack("<I", frame << 12 | rights)
        if size == 8 and kind == 3:
            high = rng.choice((0, 0, 0x8000_0000, 0x0010_0000))
            out += self._mem("c7", 0, at + 4) + struct.pack("<I", high)
        return Item(out + forget, is_whole=True)


def _sets_stack(found: iced.Instruction) -> bool:
    """Whether the stack may be where no memory is: that belongs to devices, and to other tests."""
    register = found.op0_register if found.op_count else iced.Register.NONE
    by_register = register and iced.RegisterExt.is_gpr(register) and (
        iced.RegisterExt.full_register(register) == iced.Register.RSP
    )  # fmt: skip
    return bool(by_register) or found.mnemonic in (iced.Mnemonic.LEAVE, iced.Mnemonic.ENTER)


def registers(rng: random.Random, mode: str) -> dict[str, int]:
    """Those that a fragment begins with."""
    out = stage.registers(mode)
    wide = 64 if mode == LONG else 32
    names = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi")
    for name in names + (tuple(f"r{n}" for n in range(8, 16)) if mode == LONG else ()):
        out[name] = rng.getrandbits(rng.choice((5, 16, wide)))
    for name in ("rbx", "rbp", "rsi", "rdi") + (("r8", "r9", "r10") if mode == LONG else ()):
        out[name] = stage.DATA + rng.randrange(0x800, 0x7800)
    out["rcx"] = rng.randrange(40)
    out["rflags"] = rng.getrandbits(12) & STATUS | 2 | rng.choice((0, 0x200))
    cr0 = 0x33 | (0 if mode == UNPAGED else 1 << 31) | 1 << 16
    out["cr0"] = cr0 | (not rng.randrange(4)) << 18
    cr4 = 0x600 | (0x20 if mode in (LONG, PAE) else 0) | rng.choice((0, 1)) << 16
    out["cr4"] = cr4 | (not rng.randrange(10)) << 20 | (not rng.randrange(5)) << 21
    if mode in (LONG, PAE) and rng.random() < 0.7:
        out["efer"] = out.get("efer", 0) | 1 << 11
    return out


def fragment(rng: random.Random, mode: str) -> Fragment:
    """One more."""
    writer = Writer(rng, mode)
    kernel, program = [], []
    for n in range(stage.BLOCKS - 1):
        kernel.append(writer.block(n, ITEMS, is_program=False))
        program.append(writer.block(n, ITEMS // 2, is_program=True))
    repeats = tuple(rng.choice((1, 1, 2, 3)) for _ in range(stage.BLOCKS - 1))
    first, data = registers(rng, mode), rng.randbytes(256)
    nmis = tuple(rng.randrange(1, 60) for _ in range(rng.choice((0, 0, 0, 1, 2, 4))))
    return Fragment(mode, tuple(kernel), tuple(program), first, repeats, data, nmis)
