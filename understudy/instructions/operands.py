"""Operands of a decoded instruction, made into functions of the guest that reads and writes them.

Source: SDM 1, "Operand Addressing", "General-Purpose Registers in 64-Bit Mode", "Address
Calculations in 64-Bit Mode".

The decoder is iced-x86, and every instruction is decoded as if it were at address 0: what is
relative to RIP then needs only RIP added.

Invariants: a write of 32 bits clears the upper half of a register, a narrower one keeps the rest;
an address is as wide as the address size, before the segment's base comes to it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import iced_x86 as iced
from iced_x86 import OpKind, Register

from understudy.arch.address import PAGE
from understudy.arch.segment import SegmentName
from understudy.guest import RSP
from understudy.instructions.registers import Registers

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterNumber

Read = Callable[[Registers], int]
Write = Callable[[Registers, int], None]

LONGEST: Final = 15  # bytes of an instruction
LOW32: Final = 0xFFFF_FFFF
MASK64: Final = (1 << 64) - 1
MASKS: Final = {1: 0xFF, 2: 0xFFFF, 4: LOW32, 8: MASK64}  # by bytes
SEGMENTS: Final = {
    Register.ES: SegmentName.ES, Register.CS: SegmentName.CS, Register.SS: SegmentName.SS,
    Register.DS: SegmentName.DS, Register.FS: SegmentName.FS, Register.GS: SegmentName.GS,
}  # fmt: skip
HIGH_BYTES: Final = frozenset({Register.AH, Register.CH, Register.DH, Register.BH})
RELATIVE: Final = frozenset({Register.RIP, Register.EIP})
ACCUMULATORS: Final = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}
IMMEDIATES: Final = frozenset({
    OpKind.IMMEDIATE8, OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64,
    OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE32TO64, OpKind.IMMEDIATE64,
})  # fmt: skip


# --- registers ---


def register_place(register: "RegisterNumber") -> tuple[int, int, int]:
    """(number of the general register, bytes, shift)."""
    full = iced.RegisterExt.number(iced.RegisterExt.full_register(register))
    return full, iced.RegisterExt.size(register), 8 if register in HIGH_BYTES else 0


def reader(register: "RegisterNumber") -> Read:
    """How a general register of any width is read."""
    number, size, shift = register_place(register)
    mask = MASKS[size]
    if number == RSP or shift:
        return lambda guest: guest.gpr(number) >> shift & mask
    if mask == MASK64:
        return lambda guest: guest.read_gpr(number)
    return lambda guest: guest.read_gpr(number) & mask


def writer(register: "RegisterNumber") -> Write:
    """How one is set, to a value that may have more bits."""
    number, size, shift = register_place(register)
    mask = MASKS[size]
    if size >= 4:
        if number == RSP:
            return lambda guest, value: guest.set_gpr(number, value & mask)
        return lambda guest, value: guest.write_gpr(number, value & mask)
    kept = ~(mask << shift) & MASK64

    def write(guest: Registers, value: int) -> None:
        guest.set_gpr(number, guest.gpr(number) & kept | (value & mask) << shift)

    return write


def advance(guest: Registers, number: int, by: int, mask: int) -> None:
    """Add to a register as an instruction with this address size does."""
    old = guest.gpr(number)
    new = old + by & mask
    if mask == 0xFFFF:
        new |= old & ~mask
    guest.set_gpr(number, new)


def source(instruction: iced.Instruction, n: int, size: int) -> Read | None:
    """An operand that is no memory: an immediate, or a general register.  None: neither."""
    kind = instruction.op_kind(n)
    if kind in IMMEDIATES:
        value = int(instruction.immediate(n)) & MASKS[size]
        return lambda guest: value
    register = instruction.op_register(n) if kind == OpKind.REGISTER else Register.NONE
    return reader(register) if iced.RegisterExt.is_gpr(register) else None


def target(instruction: iced.Instruction, n: int) -> Write | None:
    """Where a result goes that does not go to memory.  None: to no general register."""
    if instruction.op_kind(n) != OpKind.REGISTER:
        return None
    register = instruction.op_register(n)
    return writer(register) if iced.RegisterExt.is_gpr(register) else None


# --- addresses ---


def segment_base(register: "RegisterNumber", bits: int) -> Read | None:
    """How the base of a segment is read.  None: it counts as 0 (SDM 3A, "Segmentation in IA-32e
    Mode")."""
    if bits == 64 and register not in (Register.FS, Register.GS):
        return None
    number = int(SEGMENTS[register])
    return lambda guest: guest.segment_base(number)


def linear(base: Read | None, offset: Read, bits: int) -> Read:
    """The linear address of an offset in a segment."""
    if base is None:
        return offset
    reach = MASK64 if bits == 64 else LOW32
    return lambda guest: base(guest) + offset(guest) & reach


def effective_address(instruction: iced.Instruction) -> Read:
    """The offset of the memory operand in its segment."""
    base, index = instruction.memory_base, instruction.memory_index
    named = base if base != Register.NONE else index
    size = iced.RegisterExt.size(named) if named else instruction.memory_displ_size
    displacement, mask = int(instruction.memory_displacement), MASKS[size]
    if base in RELATIVE:
        return lambda guest: guest.rip + displacement & mask
    first = reader(base) if base else None
    if index:
        second, scale = reader(index), instruction.memory_index_scale
        if first is None:
            return lambda guest: second(guest) * scale + displacement & mask
        return lambda guest: first(guest) + second(guest) * scale + displacement & mask
    if first is None:
        return lambda guest: displacement & mask
    if not displacement:
        return first
    return lambda guest: first(guest) + displacement & mask


def operand_address(instruction: iced.Instruction, bits: int) -> Read:
    """The linear address of the memory operand."""
    base = segment_base(instruction.memory_segment, bits)
    return linear(base, effective_address(instruction), bits)


def pieces(gva: int, size: int) -> list[tuple[int, int]]:
    """[gva, gva+size) cut at the page boundaries."""
    out = []
    while size:
        part = min(size, PAGE - (gva & PAGE - 1))
        out.append((gva, part))
        gva, size = gva + part, size - part
    return out
