"""String instructions of a program that is interpreted: on linear addresses, as many at once as go.

Source: SDM 1, "String Operations"; SDM 2, "REP/REPE/REPZ/REPNE/REPNZ - Repeat String Operation
Prefix" and the instructions' own pages.

Invariants: memory is as after one element after the other; whatever ends a repetition early leaves
the registers as after the last whole element, and the flags as before; a repetition gives way after
`LONGEST_BURST` elements at the latest.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced

from understudy.arch.address import PAGE
from understudy.arch.segment import SegmentName
from understudy.instructions.access import Load, Store
from understudy.instructions.arithmetic import ZF
from understudy.instructions.operands import (
    ACCUMULATORS,
    MASK64,
    SEGMENTS,
    advance,
    reader,
    writer,
)
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.stack import Flow
from understudy.instructions.strings import (
    CMPS,
    DF,
    LODS,
    MOVS,
    RCX,
    RDI,
    RSI,
    SCAS,
    STOS,
    StringPlan,
    string_plan,
)  # fmt: skip

LONGEST_BURST: Final = 4096
ES: Final = int(SegmentName.ES)
Place = Callable[[Program, int, int, bool], int]
"""(program, offset, bytes, whether to write) to a linear address, or NotHere."""
One = Callable[[Program, Load, Store], int | None]
"""Does one element; of a comparison, the flags."""


class Again(Exception):
    """A part of a repeated instruction is done, and the rest is not begun."""


def is_string(instruction: iced.Instruction) -> bool:
    """Whether it is one of the five; its operands are found by registers."""
    return string_plan(instruction, 64) is not None


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out a string instruction.  None: it is none of the five."""
    plan = string_plan(instruction, bits)
    if plan is None:
        return None
    source, target = _place(instruction, plan, bits), _place_es(bits)
    registers = [RSI] * (plan.family not in (STOS, SCAS)) + [RDI] * (plan.family is not LODS)
    one = _element(plan, source, target)
    size, mask, ends_on = plan.size, plan.mask, plan.ends_on

    def move_on(r: Program) -> None:
        step = -size if r.rflags & DF else size
        for number in registers:
            advance(r, number, step, mask)

    def once(r: Program, at: int, load: Load, store: Store) -> None:
        flags = one(r, load, store)
        move_on(r)
        if flags is not None:
            r.rflags = flags

    if not plan.repeats:
        return once
    several = _run(plan, source, target) if plan.family in (MOVS, STOS) else None

    def repeated(r: Program, at: int, load: Load, store: Store) -> None:
        done, flags = 0, None
        while left := r.gpr(RCX) & mask:
            if done >= LONGEST_BURST:
                raise Again
            n = several(r, left, load, store) if several is not None else 0
            if n:
                for number in registers:
                    advance(r, number, n * size, mask)
            else:
                flags, n = one(r, load, store), 1
                move_on(r)
            advance(r, RCX, -n, mask)
            done += n
            if flags is not None and flags & ZF == ends_on:
                break
        if flags is not None:
            r.rflags = flags

    return repeated


def _place(instruction: iced.Instruction, plan: StringPlan, bits: int) -> Place:
    """Where an offset of the source is."""
    if bits != 64:
        number = int(SEGMENTS.get(instruction.memory_segment, SegmentName.DS))
        return lambda r, offset, size, write: r.place(number, offset, size, write)
    base = plan.source
    if base is None:
        return lambda r, offset, size, write: offset
    return lambda r, offset, size, write: base(r) + offset & MASK64


def _place_es(bits: int) -> Place:
    """Where one of the target is, always in ES."""
    if bits != 64:
        return lambda r, offset, size, write: r.place(ES, offset, size, write)
    return lambda r, offset, size, write: offset


def _element(plan: StringPlan, source: Place, target: Place) -> One:
    size, mask, compare = plan.size, plan.mask, plan.compare
    accumulator, accumulate = reader(ACCUMULATORS[size]), writer(ACCUMULATORS[size])

    def move(r: Program, load: Load, store: Store) -> None:
        value = load(source(r, r.gpr(RSI) & mask, size, False), size)
        store(target(r, r.gpr(RDI) & mask, size, True), size, value)

    def put(r: Program, load: Load, store: Store) -> None:
        store(target(r, r.gpr(RDI) & mask, size, True), size, accumulator(r))

    def get(r: Program, load: Load, store: Store) -> None:
        accumulate(r, load(source(r, r.gpr(RSI) & mask, size, False), size))

    def compared(r: Program, load: Load, store: Store) -> int:
        left = load(source(r, r.gpr(RSI) & mask, size, False), size)
        right = load(target(r, r.gpr(RDI) & mask, size, False), size)
        return compare(left, right, r.rflags)[1]

    def scanned(r: Program, load: Load, store: Store) -> int:
        value = load(target(r, r.gpr(RDI) & mask, size, False), size)
        return compare(accumulator(r), value, r.rflags)[1]

    actions: dict[tuple[int, ...], One] = {
        MOVS: move, STOS: put, LODS: get, CMPS: compared, SCAS: scanned,
    }  # fmt: skip
    return actions[plan.family]


def _run(
    plan: StringPlan, source: Place, target: Place
) -> Callable[[Program, int, Load, Store], int]:
    """Upwards inside one page of each: how many elements it was.  0: one has to go by itself."""
    size, mask, is_move = plan.size, plan.mask, plan.family is MOVS
    accumulator = reader(ACCUMULATORS[size])

    def run(r: Program, left: int, load: Load, store: Store) -> int:
        if r.rflags & DF:
            return 0
        to, of = r.gpr(RDI) & mask, r.gpr(RSI) & mask
        try:
            most = _room(to, target(r, to, size, True), mask)
            if is_move:
                at = source(r, of, size, False)
                most = min(most, _room(of, at, mask))
                # What is written must not be read here, wherever the two pages really lie.
                distance = target(r, to, size, True) - at & PAGE - 1
                most = min(most, distance or PAGE)
            n = min(left, most // size, LONGEST_BURST)
            if n < 2:
                return 0
            where = target(r, to, n * size, True)
            if is_move:
                value = load(source(r, of, n * size, False), n * size)
            else:
                value = int.from_bytes(accumulator(r).to_bytes(size, "little") * n, "little")
        except NotHere:
            return 0
        store(where, n * size, value)
        return n

    return run


def _room(offset: int, linear: int, mask: int) -> int:
    """Bytes up to the end of the page, and of what the address size reaches."""
    return min(PAGE - (linear & PAGE - 1), mask - offset + 1)
