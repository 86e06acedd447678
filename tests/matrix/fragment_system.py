"""Sensitive instructions, drawn at random: what a deprivileged kernel may not see done.

Source: SDM 2; Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure
Virtual Machine Monitor", for what is sensitive.
"""

import random
import struct
from typing import Final

from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_code import Item
from tests.matrix.fragment_stage import LONG

STATUS: Final = 0x8D5
MSRS: Final = (
    0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102,
    0xC000_0103, 0x174, 0x175, 0x176, 0x277, 0x10, 0x3B, 0x1B, 0x1A0, 0x808, 0x80A, 0x80B, 0x83F,
    0x6E0, 0x1D9, 0x8B, 0xFE, 0x2FF, 0x1234, 0x48, 0x802,
)  # fmt: skip
ADDRESSES: Final = (
    stage.DATA, stage.DATA + 0x1FFE, stage.PROGRAM_DATA, stage.PROGRAM_DATA + 0xFFC, stage.TABLE,
    1 << 47, (1 << 64) - 0x1000, 0, 0x7FFF_FFFF_F000,
)  # fmt: skip
DATA_PAGES: Final = range(stage.DATA >> 12, stage.OTHER_CODE >> 12)


SHADOWED: Final = b"\xfa\xfb"
"""STI, after a CLI: whether one with IF set has a shadow is not the same under translation, which
does not look whether IF was set.
"""


class Drawing:
    """Items for one fragment."""

    def __init__(self, rng: random.Random, mode: str) -> None:
        self.rng, self.mode, self.is_long = rng, mode, mode == LONG
        self.bits = 64 if self.is_long else 32
        self.number, self.is_program = 0, False  # of the block
        self.is_stepped = False  # a trap may come between an edit and what makes it known

    def _selector(self) -> int:
        return self.rng.choice(stage.SELECTORS)

    def _chance(self, n: int) -> bool:
        return not self.rng.randrange(n)

    def _mem(self, opcode: str, register: int, at: int) -> bytes:
        return stage.at(self.mode, opcode, register, at)

    def _place(self) -> int:
        return self.rng.choice(DATA_PAGES) << 12 | self.rng.randrange(0x100)

    def _wide(self) -> str:
        return self.rng.choice(("", "66", "48")) if self.is_long else self.rng.choice(("", "66"))

    def _set(self, register: int, value: int) -> bytes:
        """MOV of 32 bits, or of 64 if that takes them."""
        if self.is_long and value >> 32:
            return bytes((0x48, 0xB8 + register)) + struct.pack("<Q", value)
        return bytes((0xB8 + register,)) + struct.pack("<I", value & 0xFFFF_FFFF)

    def _flags(self) -> int:
        flags = self.rng.getrandbits(12) & STATUS | self.rng.choice((0, 0x200)) | 2
        flags |= self.rng.randrange(4) << 12 if self._chance(3) else 0
        if self._chance(25):
            flags |= 1 << 8
            self.is_stepped = True
        for bit, one_in in ((10, 8), (14, 12), (16, 12), (18, 5), (21, 3), (17, 40)):
            flags |= self._chance(one_in) << bit
        return flags

    def flags(self) -> Item:
        """CLI, STI, PUSHF, POPF."""
        kind = self.rng.randrange(6)
        if kind < 2:
            return Item(b"\xfa" if kind else SHADOWED)
        if kind == 2:
            return Item(bytes.fromhex(self.rng.choice(("9c 5a", "9c 8f 04 24", "66 9c 66 5a"))))
        if kind == 3:
            return Item(b"\x66\x68" + struct.pack("<H", self._flags() & 0xFFFF) + b"\x66\x9d")
        return Item(b"\x68" + struct.pack("<I", self._flags()) + b"\x9d")

    def selectors(self) -> Item:
        """What says something of segments: LAR, LSL, VERR, VERW, and stores of system registers."""
        rng = self.rng
        if rng.random() < 0.5 and not self.is_program:
            what = rng.choice(("0f02c1", "0f03c1", "0f00e1", "0f00e9", "63c8"))
            if what == "63c8" and self.is_long:
                what = "0f02c1"
            return Item(self._set(1, self._selector()) + bytes.fromhex(what + "0f94c2"))
        if rng.random() < 0.5:
            register = rng.randrange(6) << 3
            if self._chance(3):
                return Item(self._mem("8c", register >> 3, self._place()))
            return Item(bytes.fromhex(self._wide()) + bytes((0x8C, 0xC2 | register)))
        opcode, which = rng.choice((("0f00", 0), ("0f00", 1), ("0f01", 4)))
        if self._chance(3):
            return Item(self._mem(opcode, which, self._place()))
        return Item(bytes.fromhex(self._wide() + opcode) + bytes((0xC2 | which << 3,)))

    def loads(self) -> Item:
        """MOV, PUSH and POP of segment registers, LSS and its kin."""
        rng, selector = self.rng, self._selector()
        kind = rng.randrange(4)
        if self.is_program and not selector & ~3:
            selector = stage.USER_DATA | 3
        if kind == 0:
            return Item(self._set(0, selector) + bytes((0x8E, 0xC0 | rng.randrange(6) << 3)))
        push = b"\x68" + struct.pack("<I", selector)
        pops, pushes = ["0fa1", "0fa9"], ["0fa0", "0fa8"]
        if not self.is_long:
            pops += ["07", "17", "1f", "660fa1"]
            pushes += ["06", "0e", "16", "1e", "660fa0"]
        if kind == 1:
            return Item(push + bytes.fromhex(rng.choice(pops)))
        if kind == 2:
            return Item(bytes.fromhex(rng.choice(pushes)) + b"\x5a")
        wide = "48" if self.is_long else ""
        which = rng.choice(("0fb2", "0fb4", "0fb5"))
        return Item(push + b"\x6a\x08" + bytes.fromhex(wide + which + rng.choice(("0424", "1c24"))))

    def tables(self) -> Item:
        """LGDT, LIDT, LLDT, LTR, SGDT, SIDT."""
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            which = rng.choice((stage.SHORT_GDT, stage.LONG_GDT, stage.LONG_GDT))
            return Item(self._mem("0f01", 2, which))
        if kind == 1:
            which = rng.choice((stage.SHORT_IDT, stage.LONG_IDT, stage.LONG_IDT))
            return Item(self._mem("0f01", 3, which))
        if kind == 2:
            return Item(self._mem("0f01", rng.randrange(2), self._place()))
        selector = rng.choice((stage.LDT_SELECTOR, stage.OTHER_TASK, self._selector(), 0))
        return Item(self._set(0, selector) + bytes((0x0F, 0x00, 0xC0 | rng.choice((2, 3)) << 3)))

    def control(self) -> Item:
        """MOV CR, CLTS, LMSW, SMSW."""
        rng = self.rng
        kind = rng.randrange(8)
        if kind < 2:
            return Item(bytes((0x0F, 0x20, 0xC2 | rng.choice((0, 2, 3, 4, 4)) << 3)))
        if kind < 5:
            bits = {0: (1, 2, 3, 5, 16, 18, 29, 30, 31, 0, 4, 6),
                    4: (2, 3, 4, 7, 8, 9, 11, 16, 18, 20, 21, 22, 13, 0, 1)}  # fmt: skip
            n = rng.choice((0, 0, 4))
            move = 0xC0 | n << 3
            toggle = b"\x0f\xba\xf8" + bytes((rng.choice(bits[n]),))
            return Item(bytes((0x0F, 0x20, move)) + toggle + bytes((0x0F, 0x22, move)))
        if kind == 5:
            return Item(bytes.fromhex(rng.choice(("0f06", "0f20d80f22d8", "0f01e0", "0f22d0"))))
        if kind == 6:
            root = rng.choice((stage.ROOT, stage.SECOND_ROOT))
            return Item(self._set(0, root) + b"\x0f\x22\xd8")
        if self.is_long and rng.random() < 0.5:
            value = rng.choice((0, 0, 3, 15, 16))
            return Item(self._set(0, value) + bytes.fromhex("440f22c0 440f20c2"))
        return Item(self._set(0, rng.getrandbits(4) | 0x10) + b"\x0f\x01\xf0")

    def msrs(self) -> Item:
        """RDMSR, WRMSR."""
        rng = self.rng
        index = rng.choice(MSRS)
        read = self._set(1, index) + b"\x0f\x32"
        if rng.random() < 0.4:
            return Item(read)
        if index == 0xC000_0080 or rng.random() < 0.3:
            return Item(read + b"\x0f\xba\xf8" + bytes((rng.choice((0, 11, 8, 3)),)) + b"\x0f\x30")
        value = rng.choice((*ADDRESSES, rng.getrandbits(64), rng.randrange(256), stage.KERNEL_CODE))
        low = b"\xb8" + struct.pack("<I", value & 0xFFFF_FFFF)
        return Item(
            self._set(1, index) + low + b"\xba" + struct.pack("<I", value >> 32) + b"\x0f\x30"
        )

    def debug(self) -> Item:
        """MOV DR."""
        rng, n = self.rng, self.rng.randrange(8)
        if rng.random() < 0.5:
            return Item(bytes((0x0F, 0x21, 0xC2 | n << 3)))
        value = self._place() if n < 4 else 0x400
        if n == 7 and rng.random() < 0.3:
            value |= 1 << 2 * rng.randrange(4) | rng.choice((0, 1, 3)) << 16
        return Item(self._set(0, value) + bytes((0x0F, 0x23, 0xC0 | n << 3)))
