"""What segments let a program reach, outside 64-bit code.

Source: SDM 3A, "Segmentation", "Limit Checking", "Type Checking"; SDM 3C, "Guest Register State",
for the access rights as they are kept.

Invariant: what is refused here may be allowed by the processor (which is then asked), but nothing
is allowed that it would refuse.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpAccess, OpKind

from understudy.arch.segment import Segment
from understudy.instructions.access import NOPS, has_memory_operand
from understudy.instructions.bits import is_bit_string, words_away
from understudy.instructions.operands import (
    LOW32,
    MASKS,
    SEGMENTS,
    Read,
    effective_address,
    linear,
    operand_address,
    segment_base,
)
from understudy.instructions.registers import NotHere, Program

READ_WRITE, CODE, EXPAND_DOWN, DATA_OR_CODE = 1 << 1, 1 << 3, 1 << 2, 1 << 4
DEFAULT_BIG, UNUSABLE = 1 << 14, 1 << 16
Address = Callable[[Program], int]
ACCESSES_NOTHING: Final = NOPS | {Mnemonic.LEA}
WRITES: Final = frozenset({
    OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE,
})  # fmt: skip


class Reach(NamedTuple):
    """A segment's base, first and last offset, and what may be done with it."""

    base: int
    first: int
    last: int
    may_read: bool
    may_write: bool


def reach(segment: Segment, is_real: bool) -> Reach:
    """`is_real`: real-address or virtual-8086 mode, where the type counts for nothing."""
    _, base, limit, rights = segment
    grows_down = rights & (DATA_OR_CODE | CODE | EXPAND_DOWN) == DATA_OR_CODE | EXPAND_DOWN
    if grows_down:
        first, last = limit + 1, LOW32 if rights & DEFAULT_BIG else 0xFFFF
    else:
        first, last = 0, limit
    is_usable, kind = not rights & UNUSABLE, rights & (CODE | READ_WRITE)
    return Reach(
        base, first, last, is_real or (is_usable and kind != CODE),
        is_real or (is_usable and kind == READ_WRITE),
    )  # fmt: skip


def place(of: Reach, offset: int, size: int, write: bool) -> int:
    """The linear address of so many bytes there.  NotHere: the segment refuses them."""
    base, first, last, may_read, may_write = of
    if offset < first or offset + size - 1 > last or not (may_write if write else may_read):
        raise NotHere
    return base + offset & LOW32


def is_written(instruction: iced.Instruction) -> bool:
    """Whether the instruction writes the operand that it has in memory, or may."""
    info = iced.InstructionInfoFactory().info(instruction)
    return any(
        instruction.op_kind(n) == OpKind.MEMORY and info.op_access(n) in WRITES
        for n in range(instruction.op_count)
    )


def _limited(instruction: iced.Instruction, size: int, away: Read | None) -> Address:
    """`away`: how far from the operand the bytes are that are accessed (of bit strings)."""
    number, offset = int(SEGMENTS[instruction.memory_segment]), effective_address(instruction)
    write = is_written(instruction)
    if away is None:
        return lambda r: r.place(number, offset(r), size, write)
    mask = address_mask(instruction)
    return lambda r: r.place(number, offset(r) + away(r) & mask, size, write)


def address_mask(instruction: iced.Instruction) -> int:
    """All ones in an address of the memory operand's address size."""
    named = instruction.memory_base or instruction.memory_index
    return MASKS[iced.RegisterExt.size(named) if named else instruction.memory_displ_size]


def linear_address(instruction: iced.Instruction, bits: int, size: int) -> Address | None:
    """Where the bytes are that an action is given as its operand, `size` of them.  None: nowhere.

    Calling it raises NotHere if the segment refuses them.
    """
    if instruction.mnemonic in ACCESSES_NOTHING or not has_memory_operand(instruction):
        return None
    away = words_away(instruction) if is_bit_string(instruction) else None
    if bits != 64:
        return _limited(instruction, size, away)
    if away is None:
        return operand_address(instruction, bits)
    mask, offset = address_mask(instruction), effective_address(instruction)
    base = segment_base(instruction.memory_segment, bits)
    return linear(base, lambda r: offset(r) + away(r) & mask, bits)
