"""How an instruction's action reaches its operands, of which one at most is in memory.

An action is called with the registers, the place of its memory operand, and two functions of the
caller: `load(place, bytes)` and `store(place, bytes, value)`.  What a place is the caller knows: a
gpa inside one page for devices and page tables, a linear address for one who interprets a guest.

Source: SDM 2A, "Instruction Format".

Invariant: what an immediate or a register gives is masked to its width, what is stored too.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.instructions.operands import source, target
from understudy.instructions.registers import Registers

NOPS: Final = frozenset({
    Mnemonic.NOP, Mnemonic.ENDBR64, Mnemonic.ENDBR32, Mnemonic.RESERVEDNOP, Mnemonic.LFENCE,
    Mnemonic.MFENCE, Mnemonic.SFENCE, Mnemonic.PREFETCH, Mnemonic.PREFETCHNTA,
    Mnemonic.PREFETCHT0, Mnemonic.PREFETCHT1, Mnemonic.PREFETCHT2, Mnemonic.PREFETCHW,
    Mnemonic.PREFETCHWT1, Mnemonic.CLDEMOTE, Mnemonic.SERIALIZE,
})  # fmt: skip
"""What does nothing here, as hints do and fences where each access is in order already."""
Load = Callable[[int, int], int]
"""(place, bytes): the value there."""
Store = Callable[[int, int, int], None]
"""(place, bytes, value)."""
Action = Callable[[Registers, int, Load, Store], None]
"""Does what an instruction does; its memory operand is at this place."""
Make = Callable[[iced.Instruction], Action | None]
"""How to carry out an instruction.  None: not here."""
Get = Callable[[Registers, int, Load], int]
Put = Callable[[Registers, int, Store, int], None]


def operand_size(instruction: iced.Instruction, n: int) -> int:
    """Bytes of an operand; of an immediate, those of the operand that it goes with."""
    kind = instruction.op_kind(n)
    if kind == OpKind.REGISTER:
        return iced.RegisterExt.size(instruction.op_register(n))
    if kind == OpKind.MEMORY:
        return iced.MemorySizeExt.size(instruction.memory_size)
    return operand_size(instruction, 0)


def has_memory_operand(instruction: iced.Instruction) -> bool:
    """Whether an operand is memory that the instruction names."""
    return OpKind.MEMORY in (instruction.op_kind(n) for n in range(instruction.op_count))


def getter(instruction: iced.Instruction, n: int, size: int = 0) -> Get | None:
    """How an operand is read.  None: it is neither memory nor immediate nor a general register.

    `size`: its bytes, if they are not `operand_size`.
    """
    size = size or operand_size(instruction, n)
    if instruction.op_kind(n) == OpKind.MEMORY:
        return lambda guest, at, load: load(at, size)
    read = source(instruction, n, size)
    return None if read is None else lambda guest, at, load: read(guest)


def putter(instruction: iced.Instruction, n: int) -> Put | None:
    """How one is written.  None: it is neither memory nor a general register."""
    if instruction.op_kind(n) == OpKind.MEMORY:
        size = operand_size(instruction, n)
        mask = (1 << 8 * size) - 1
        return lambda guest, at, store, value: store(at, size, value & mask)
    write = target(instruction, n)
    return None if write is None else lambda guest, at, store, value: write(guest, value)
