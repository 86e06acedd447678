"""A random kernel fragment: blocks of instructions, and the registers that it begins with.

What: its code laid out, in words, and made smaller.  Source: none.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import iced_x86 as iced

from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_stage import LONG

ROOM: Final = stage.BLOCK - 20  # of a block, for its items


class Item(NamedTuple):
    """Instructions that belong together.  At `hole` goes their own address, plus `beyond`."""

    code: bytes
    hole: int = -1
    beyond: int = 0

    def at(self, address: int) -> bytes:
        """Its bytes there."""
        if self.hole < 0:
            return self.code
        value = struct.pack("<I", address + self.beyond)
        return self.code[: self.hole] + value + self.code[self.hole + 4 :]


Block = tuple[Item, ...]


@dataclass(frozen=True)
class Fragment:
    """What a fragment has of its own."""

    mode: str
    kernel: tuple[Block, ...]
    program: tuple[Block, ...]
    registers: dict[str, int]
    repeats: tuple[int, ...]
    data: bytes  # what is in the first bytes of each page of data

    def image(self, memory: bytes) -> bytes:
        """All memory when it begins."""
        out = bytearray(memory)
        for n in range(stage.BLOCKS - 1):
            kernel, program = stage.block(n), stage.PROGRAM + n * stage.BLOCK
            code = lay(self.kernel[n], kernel)
            code += stage.at(self.mode, "ff", 1, stage.REPEATS + 4 * n)  # dec; jnz
            code += b"\x0f\x85" + struct.pack("<i", -len(code) - 6)
            go_on = stage.next_block(self.mode) - (kernel + len(code) + 5)
            out[kernel : kernel + stage.BLOCK] = (
                code + b"\xe9" + struct.pack("<i", go_on)
            ).ljust(stage.BLOCK, b"\xcc")  # fmt: skip
            code = lay(self.program[n], program) + bytes((0xCD, stage.GO_ON))
            out[program : program + stage.BLOCK] = code.ljust(stage.BLOCK, b"\xcc")
            struct.pack_into("<I", out, stage.REPEATS + 4 * n, self.repeats[n])
        for page in range(stage.DATA, 0x1_8000, 0x1000):
            out[page : page + len(self.data)] = self.data
        return bytes(out)

    def text(self) -> str:
        """In words."""
        lines = [f"{self.mode}: {_given(self)}, repeats {self.repeats}"]
        for what, blocks, base in (
            ("kernel", self.kernel, 0), ("program", self.program, stage.PROGRAM),
        ):  # fmt: skip
            for n, block in enumerate(blocks):
                if block:
                    at = base + n * stage.BLOCK if base else stage.block(n)
                    lines.append(f"  {what} {n}: {disassembled(lay(block, at), self.mode, at)}")
        return "\n".join(lines)


def lay(block: Sequence[Item], at: int) -> bytes:
    """A block's bytes."""
    out = b""
    for item in block:
        out += item.at(at + len(out))
    return out


def _given(fragment: Fragment) -> str:
    fixed = stage.registers(fragment.mode)
    own = {name: value for name, value in fragment.registers.items() if fixed.get(name) != value}
    return ", ".join(f"{name}={value:#x}" for name, value in own.items() if value)


def disassembled(code: bytes, mode: str, at: int) -> str:
    """One after the other."""
    decoder = iced.Decoder(64 if mode == LONG else 32, code, ip=at)
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    return "; ".join(formatter.format(one) for one in decoder)


def smaller(one: Fragment) -> list[Fragment]:
    """The same without a block, or without an item, or simpler: those that take most come first."""
    out = []
    for name, blocks in (("kernel", one.kernel), ("program", one.program)):
        for n, block in enumerate(blocks):
            if block:
                out.append(replace(one, **{name: (*blocks[:n], (), *blocks[n + 1 :])}))
    for name, blocks in (("kernel", one.kernel), ("program", one.program)):
        for n, block in enumerate(blocks):
            for at in range(len(block) if len(block) > 1 else 0):
                less = block[:at] + block[at + 1 :]
                out.append(replace(one, **{name: (*blocks[:n], less, *blocks[n + 1 :])}))
    if any(count > 1 for count in one.repeats):
        out.append(replace(one, repeats=(1,) * len(one.repeats)))
    if any(one.data):
        out.append(replace(one, data=bytes(len(one.data))))
    return out
