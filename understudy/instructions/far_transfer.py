"""Far transfers: to another code segment, back from it, and back from a handler.

Source: SDM 1, "Far CALL and RET Operation"; SDM 3A, "Privilege Levels", "Accessing a Code Segment
Directly", "Returning from a Called Procedure"; SDM 2, "IRET/IRETD/IRETQ", "RET".

Invariants: a transfer that is done here has passed every check of its kind; gates, tasks,
virtual-8086 mode, and whatever faults are NotHere, and nothing has changed then.
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Code, Mnemonic, OpKind

from understudy.arch.address import is_canonical
from understudy.arch.segment import Segment, SegmentName
from understudy.guest import RSP
from understudy.instructions.access import Load, Store
from understudy.instructions.flag_control import (
    AC,
    FIXED,
    ID,
    IF,
    IOPL,
    NT,
    PLAIN16,
    RF,
    VM,
    is_trusted,
)  # fmt: skip
from understudy.instructions.operands import MASK64, MASKS
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_loads import (
    MEMORY,
    SS,
    FarPointer,
    descriptor,
    marked,
    real_segment,
)  # fmt: skip
from understudy.instructions.stack import FLAT, SEGMENTED, Flow, Stack, stack_of
from understudy.instructions.task_switch import (
    CODE_TYPE,
    CONFORMING,
    DEFAULT_BIG,
    PRESENT,
    READ_WRITE,
    UNUSABLE,
)  # fmt: skip

CS: Final = int(SegmentName.CS)
LONG_CODE: Final = 1 << 13  # L of access rights
DATA_SEGMENTS: Final = (SegmentName.ES, SegmentName.DS, SegmentName.FS, SegmentName.GS)
VIRTUAL: Final = 3 << 19  # VIF and VIP
FAR_SIZES: Final = {
    Code.CALL_M1616: 2, Code.JMP_M1616: 2, Code.CALL_M1632: 4, Code.JMP_M1632: 4,
    Code.CALL_M1664: 8, Code.JMP_M1664: 8,
}  # fmt: skip
RETURNS: Final = {
    Code.RETFW: 2, Code.RETFW_IMM16: 2, Code.RETFD: 4, Code.RETFD_IMM16: 4,
    Code.RETFQ: 8, Code.RETFQ_IMM16: 8,
}  # fmt: skip
IRETS: Final = {Mnemonic.IRET: 2, Mnemonic.IRETD: 4, Mnemonic.IRETQ: 8}


def check_place(r: Program, code: Segment, rip: int) -> None:
    """NotHere: there is no such place in the segment."""
    is_64 = r.is_long and bool(code.rights & LONG_CODE)
    if not is_canonical(rip) if is_64 else rip > code.limit:
        raise NotHere


def code_segment(r: Program, selector: int, load: Load, store: Store) -> Segment:
    """The segment of a far CALL or JMP at the same level."""
    if r.is_real:
        return real_segment(r.guest.segment(CS), selector)
    if r.rflags & (VM | AC) or r.cpl == 3:
        raise NotHere
    found, at = descriptor(r, selector, load)
    level = found.dpl <= r.cpl if found.kind & CONFORMING else (
        selector & 3 <= r.cpl and found.dpl == r.cpl
    )  # fmt: skip
    _check_code(r, found.rights, level)
    return Segment(selector & ~3 | r.cpl, *marked(found, at, store))


def _check_code(r: Program, rights: int, level_fits: bool) -> None:
    is_code = rights & (MEMORY | CODE_TYPE | PRESENT) == MEMORY | CODE_TYPE | PRESENT
    is_mixed = r.is_long and rights & (LONG_CODE | DEFAULT_BIG) == LONG_CODE | DEFAULT_BIG
    if not is_code or not level_fits or is_mixed:
        raise NotHere


def _far(instruction: iced.Instruction, bits: int) -> Flow | None:
    """Far CALL and JMP."""
    kind, is_call = instruction.op0_kind, instruction.mnemonic == Mnemonic.CALL
    length, stack = instruction.len, stack_of(bits)
    pointer = None
    if kind in (OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32):
        is_16 = kind == OpKind.FAR_BRANCH16
        size = 2 if is_16 else 4
        fixed = (
            instruction.far_branch16 if is_16 else instruction.far_branch32,
            instruction.far_branch_selector,
        )
    else:
        size, fixed = FAR_SIZES[instruction.code], (0, 0)
        pointer = FarPointer(instruction, bits, size)
    next_mask = MASK64 if bits == 64 else MASKS[4]

    def far(r: Program, at: int, load: Load, store: Store) -> None:
        offset, selector = fixed if pointer is None else pointer(r, load)
        code = code_segment(r, selector, load, store)
        check_place(r, code, offset)
        if is_call:
            back = (r.selector(CS), r.rip + length & next_mask)
            _push(r, stack, size, back, store)
        r.enter_code(code, offset, r.cpl)

    return far


def _push(
    r: Program, stack: Stack, size: int, values: tuple[int, ...], store: Store
) -> None:  # fmt: skip
    """Push them all, or refuse with nothing changed but memory below the stack."""
    place, pointer = stack
    sp = r.gpr(RSP)
    for value in values:
        sp -= size
        store(place(r, sp, size, True), size, value & MASKS[size])
    r.set_gpr(RSP, pointer(r, sp))


def _pop(r: Program, stack: Stack, size: int, count: int, load: Load) -> list[int]:
    """The values on the stack, from the top; the stack pointer stays."""
    sp = r.gpr(RSP)
    return [load(stack.place(r, sp + n * size, size, False), size) for n in range(count)]


def return_code(r: Program, selector: int, load: Load, store: Store) -> Segment:
    """The code segment to which a far return or IRET goes."""
    if r.is_real:
        return real_segment(r.guest.segment(CS), selector)
    if r.rflags & (VM | AC) or r.cpl == 3:
        raise NotHere
    found, at = descriptor(r, selector, load)
    rpl = selector & 3
    level = found.dpl <= rpl if found.kind & CONFORMING else found.dpl == rpl
    _check_code(r, found.rights, level and rpl >= r.cpl)
    return Segment(selector, *marked(found, at, store))


def return_stack(r: Program, selector: int, code: Segment, load: Load, store: Store) -> Segment:
    """The stack segment that goes with it."""
    rpl = code.selector & 3
    if not selector & ~3:
        if not r.is_long or not code.rights & LONG_CODE or rpl == 3 or selector != rpl:
            raise NotHere
        return Segment(selector, 0, 0, UNUSABLE | rpl << 5)
    found, at = descriptor(r, selector, load)
    is_writable = found.kind & (MEMORY | CODE_TYPE | READ_WRITE) == MEMORY | READ_WRITE
    if selector & 3 != rpl or found.dpl != rpl or not is_writable or not found.rights & PRESENT:
        raise NotHere
    return Segment(selector, *marked(found, at, store))


def drop_inner_segments(r: Program, cpl: int) -> None:
    """A return to an outer level: what it may not use gets a null selector, but keeps its base."""
    for n in DATA_SEGMENTS:
        old = r.guest.segment(n)
        is_conforming = old.rights & (CODE_TYPE | CONFORMING) == CODE_TYPE | CONFORMING
        if not old.selector & ~3:
            new = old._replace(selector=0)
        elif not is_conforming and old.rights >> 5 & 3 < cpl:
            new = old._replace(selector=0, rights=UNUSABLE)
        else:
            continue
        if new != old:
            r.load_segment(int(n), new)


def _enter_stack(r: Program, stack: Segment, sp: int, code: Segment) -> None:
    is_64 = r.is_long and bool(code.rights & LONG_CODE)
    mask = MASK64 if is_64 else MASKS[4] if stack.rights & DEFAULT_BIG else 0xFFFF
    r.load_segment(SS, stack)
    r.set_gpr(RSP, r.gpr(RSP) & ~mask | sp & mask if mask == 0xFFFF else sp & mask)


def _retf(instruction: iced.Instruction, bits: int) -> Flow:
    size, stack = RETURNS[instruction.code], stack_of(bits)
    extra = instruction.immediate16 if instruction.op_count else 0

    def retf(r: Program, at: int, load: Load, store: Store) -> None:
        rip, selector = _pop(r, stack, size, 2, load)
        code = return_code(r, selector & 0xFFFF, load, store)
        if not r.is_real and code.selector & 3 != r.cpl:
            raise NotHere
        check_place(r, code, rip)
        r.set_gpr(RSP, stack.pointer(r, r.gpr(RSP) + 2 * size + extra))
        r.enter_code(code, rip, r.cpl)

    return retf


def _iret(instruction: iced.Instruction, bits: int) -> Flow:
    size = IRETS[instruction.mnemonic]
    stack = FLAT if bits == 64 else SEGMENTED
    plain = PLAIN16 if size == 2 else PLAIN16 | RF | AC | ID

    def iret(r: Program, at: int, load: Load, store: Store) -> None:
        if (r.rflags & (NT | VM) and not r.is_real) or r.blocks_nmis():
            raise NotHere
        rip, selector, flags = _pop(r, stack, size, 3, load)
        code = return_code(r, selector & 0xFFFF, load, store)
        if flags & VM and not r.is_long and not r.is_real and size == 4:
            raise NotHere
        cpl = r.cpl if r.is_real else code.selector & 3
        outer: tuple[Segment, int] | None = None
        if not r.is_real and (cpl > r.cpl or bits == 64):
            sp, selector = _pop(r, stack, size, 5, load)[3:]
            outer = return_stack(r, selector & 0xFFFF, code, load, store), sp
        check_place(r, code, rip)
        mask = plain | (IF if r.is_real or is_trusted(r) else 0)
        if r.cpl == 0:
            mask |= IOPL | (VIRTUAL if size != 2 and not r.is_real else 0)
        if outer is None:
            r.set_gpr(RSP, stack.pointer(r, r.gpr(RSP) + 3 * size))
        r.rflags = r.rflags & ~mask | flags & mask | FIXED
        if outer is not None:
            _enter_stack(r, *outer, code)
        if cpl > r.cpl:
            drop_inner_segments(r, cpl)
        r.enter_code(code, rip, cpl)

    return iret


def transfer(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out what goes to another segment, RIP included.  None: it does not."""
    if instruction.code in FAR_SIZES or instruction.op0_kind in (
        OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32,
    ):  # fmt: skip
        return _far(instruction, bits)
    if instruction.mnemonic == Mnemonic.RETF:
        return _retf(instruction, bits)
    return _iret(instruction, bits) if instruction.mnemonic in IRETS else None
