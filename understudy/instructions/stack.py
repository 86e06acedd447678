"""The stack: PUSH, POP and their kin, frames of procedures, and the flags on the stack.

Source: SDM 1, "Stack", "Procedure Calls for Block-Structured Languages"; SDM 2, the instructions'
own pages.

An action here reaches memory by linear addresses.
Invariants: nothing has changed when an access refuses; a pop into memory that names RSP sees it
after the pop.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.segment import SegmentName
from understudy.guest import RSP
from understudy.instructions.access import Load, Store, getter
from understudy.instructions.operands import (
    MASK64,
    MASKS,
    SEGMENTS,
    advance,
    target,
)
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_limits import linear_address
from understudy.paging.guest_walk import GuestFault

Flow = Callable[[Program, int, Load, Store], None]
"""Does what an instruction does that reaches more memory than its operand, by linear addresses."""
RBP: Final = 5
SS: Final = int(SegmentName.SS)


class Stack(NamedTuple):
    """How a program's stack is reached.

    place: (program, stack pointer, bytes, whether to write) to a linear address; NotHere if it is
    not to be accessed.  pointer: what RSP is when the stack pointer is this.
    """

    place: Callable[[Program, int, int, bool], int]
    pointer: Callable[[Program, int], int]


def _flat(r: Program, sp: int, size: int, write: bool) -> int:
    return sp & MASK64


def _segmented(r: Program, sp: int, size: int, write: bool) -> int:
    return r.place(SS, sp & r.stack_mask, size, write)


def _pointer(r: Program, sp: int) -> int:
    mask = r.stack_mask
    return r.gpr(RSP) & ~mask | sp & mask if mask == 0xFFFF else sp & mask


FLAT: Final = Stack(_flat, lambda r, sp: sp & MASK64)
SEGMENTED: Final = Stack(_segmented, _pointer)


def stack_of(bits: int) -> Stack:
    """The stack of code of so many bits."""
    return FLAT if bits == 64 else SEGMENTED


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out an instruction of this group.  None: it is of another, or not here."""
    make = MAKERS.get(instruction.mnemonic)
    return None if make is None else make(instruction, stack_of(bits), bits)


def _push(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow | None:
    size = -instruction.stack_pointer_increment
    mask, (place, pointer) = MASKS[size], stack
    segment = SEGMENTS.get(instruction.op0_register)
    if instruction.op0_kind == OpKind.REGISTER and segment is not None:
        number = int(segment)

        def push_selector(r: Program, at: int, load: Load, store: Store) -> None:
            sp = r.gpr(RSP) - size
            store(place(r, sp, size, True), size, r.selector(number))
            r.set_gpr(RSP, pointer(r, sp))

        return push_selector
    get = getter(instruction, 0, size)
    if get is None:
        return None

    def push(r: Program, at: int, load: Load, store: Store) -> None:
        value, sp = get(r, at, load), r.gpr(RSP) - size
        store(place(r, sp, size, True), size, value & mask)
        r.set_gpr(RSP, pointer(r, sp))

    return push


def _pop(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow | None:
    size, (place, pointer) = instruction.stack_pointer_increment, stack
    write = target(instruction, 0)
    if write is not None:

        def pop(r: Program, at: int, load: Load, store: Store) -> None:
            sp = r.gpr(RSP)
            value = load(place(r, sp, size, False), size)
            r.set_gpr(RSP, pointer(r, sp + size))
            write(r, value)

        return pop
    address = linear_address(instruction, bits, size)
    if address is None:
        return None  # a segment register

    def pop_to_memory(r: Program, at: int, load: Load, store: Store) -> None:
        before = r.gpr(RSP)
        value = load(place(r, before, size, False), size)
        r.set_gpr(RSP, pointer(r, before + size))
        try:
            store(address(r), size, value)
        except BaseException:
            r.set_gpr(RSP, before)
            raise

    return pop_to_memory


def _push_all(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow:
    size, (place, pointer) = (2 if instruction.mnemonic == Mnemonic.PUSHA else 4), stack

    def push_all(r: Program, at: int, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        places = [place(r, sp - (n + 1) * size, size, True) for n in range(8)]
        if (places[0] ^ places[7]) >> 12:
            raise NotHere  # a part of it might be refused
        for n, where in enumerate(places):
            store(where, size, r.gpr(n) & MASKS[size])
        r.set_gpr(RSP, pointer(r, sp - 8 * size))

    return push_all


def _pop_all(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow:
    size, (place, pointer) = (2 if instruction.mnemonic == Mnemonic.POPA else 4), stack

    def pop_all(r: Program, at: int, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        values = [load(place(r, sp + n * size, size, False), size) for n in range(8)]
        r.set_gpr(RSP, pointer(r, sp + 8 * size))
        for n, value in enumerate(reversed(values)):
            if n != RSP:
                r.set_gpr(n, value if size == 4 else r.gpr(n) & ~0xFFFF | value)

    return pop_all


# --- frames of procedures ---


def _enter(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow | None:
    level = instruction.immediate8_2nd & 31
    size = {iced.Code.ENTERW_IMM16_IMM8: 2, iced.Code.ENTERD_IMM16_IMM8: 4}.get(instruction.code, 8)
    room, (place, pointer) = instruction.immediate16, stack
    mask = MASKS[size]

    def enter(r: Program, at: int, load: Load, store: Store) -> None:
        sp, bp = r.gpr(RSP) - size, r.gpr(RBP)
        frame, last = pointer(r, sp), sp - level * size
        try:  # a fault on the way would leave pushes behind: then all of it is the processor's
            r.probe(place(r, sp, size, True), size)
            for n in range(1, level):
                load(place(r, bp - n * size, size, False), size)
                r.probe(place(r, sp - n * size, size, True), size)
            for written in (last, last - room):
                r.probe(place(r, written, size, True), size)
        except GuestFault:
            raise NotHere from None
        store(place(r, sp, size, True), size, bp & mask)
        for n in range(1, level):
            value = load(place(r, bp - n * size, size, False), size)
            store(place(r, sp - n * size, size, True), size, value)
        if level:
            store(place(r, last, size, True), size, frame & mask)
        r.set_gpr(RSP, pointer(r, last - room))
        r.set_gpr(RBP, frame & mask if size > 2 else bp & ~mask | frame & mask)

    return enter


def _leave(instruction: iced.Instruction, stack: Stack, bits: int) -> Flow:
    size = {iced.Code.LEAVEW: 2, iced.Code.LEAVED: 4}.get(instruction.code, 8)
    place, pointer = stack

    def leave(r: Program, at: int, load: Load, store: Store) -> None:
        bp = r.gpr(RBP)
        value = load(place(r, bp, size, False), size)
        r.set_gpr(RSP, pointer(r, bp))
        advance(r, RSP, size, r.stack_mask)
        r.set_gpr(RBP, value if size > 2 else bp & ~0xFFFF | value)

    return leave


MAKERS: Final[dict[int, Callable[[iced.Instruction, Stack, int], Flow | None]]] = {
    Mnemonic.PUSH: _push, Mnemonic.POP: _pop, Mnemonic.PUSHA: _push_all,
    Mnemonic.PUSHAD: _push_all, Mnemonic.POPA: _pop_all, Mnemonic.POPAD: _pop_all,
    Mnemonic.ENTER: _enter, Mnemonic.LEAVE: _leave,
}  # fmt: skip
