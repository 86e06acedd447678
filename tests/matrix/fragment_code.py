"""A random kernel fragment: blocks of instructions, and the registers that it begins with.

What: its code laid out, in words, and made smaller.  Source: none.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import iced_x86 as iced

from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_stage import LONG

ROOM: Final = stage.BLOCK - 20  # of a block, for its items


class Item(NamedTuple):
    """Instructions that belong together.  At `hole` goes their own address, plus `beyond`.

    Where `is_whole`, all must be executed: what a processor does without the last one is not said.
    Where `is_store`, they write code, where the hole says; without one, at `beyond`.
    """

    code: bytes
    hole: int = -1
    beyond: int = 0
    is_whole: bool = False
    is_store: bool = False

    def writes(self, address: int) -> int | None:
        """The address that it writes, from there."""
        own = address if self.hole >= 0 else 0
        return own + self.beyond if self.is_store else None

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
    nmis: tuple[int, ...] = ()  # after so many instructions, each from the one before on

    def code(self) -> dict[int, bytes]:
        """What is at the beginning of each block, by address."""
        blocks = {stage.block(n): block for n, block in enumerate(self.kernel)}
        blocks |= {program_block(n): block for n, block in enumerate(self.program)}
        laid = [(at, *one) for at, block in blocks.items() for one in lay(block, at)]
        whole = {
            byte for _, here, item in laid if item.is_whole
            for byte in range(here, here + len(item.code))
        }  # fmt: skip
        out = dict.fromkeys(blocks, b"")
        for at, here, item in laid:
            code = item.at(here)
            out[at] += b"\x90" * len(code) if item.writes(here) in whole else code
        return out

    def image(self, memory: bytes) -> bytes:
        """All memory when it begins."""
        out, laid = bytearray(memory), self.code()
        for n in range(stage.BLOCKS - 1):
            kernel, program = stage.block(n), program_block(n)
            code = laid[kernel]
            code += stage.at(self.mode, "ff", 1, stage.REPEATS + 4 * n)  # dec; jnz
            code += b"\x0f\x85" + struct.pack("<i", -len(code) - 6)
            go_on = stage.next_block(self.mode) - (kernel + len(code) + 5)
            out[kernel : kernel + stage.BLOCK] = (
                code + b"\xe9" + struct.pack("<i", go_on)
            ).ljust(stage.BLOCK, b"\xcc")  # fmt: skip
            code = laid[program] + bytes((0xCD, stage.GO_ON))
            out[program : program + stage.BLOCK] = code.ljust(stage.BLOCK, b"\xcc")
            struct.pack_into("<I", out, stage.REPEATS + 4 * n, self.repeats[n])
        for page in range(stage.DATA, 0x1_8000, 0x1000):
            out[page : page + len(self.data)] = self.data
        return bytes(out)

    def text(self) -> str:
        """In words."""
        lines = [f"{self.mode}: {_given(self)}, repeats {self.repeats}, NMIs {self.nmis}"]
        for at, code in self.code().items():
            what = "program" if at & -0x1000 == stage.PROGRAM else "kernel"
            if code:
                n = at % 0x1000 // stage.BLOCK
                lines.append(f"  {what} {n}: {disassembled(code, self.mode, at)}")
        return "\n".join(lines)


def program_block(number: int) -> int:
    """The address of a block of the program."""
    return stage.PROGRAM + number * stage.BLOCK


def lay(block: Sequence[Item], at: int) -> Iterator[tuple[int, Item]]:
    """Where each item is."""
    for item in block:
        yield at, item
        at += len(item.code)


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
    for n, count in enumerate(one.nmis):
        rest = one.nmis[n + 1 :]
        joined = (count + rest[0], *rest[1:]) if rest else ()
        out.append(replace(one, nmis=one.nmis[:n] + joined))
    if any(count > 1 for count in one.repeats):
        out.append(replace(one, repeats=(1,) * len(one.repeats)))
    if any(one.data):
        out.append(replace(one, data=bytes(len(one.data))))
    return out
