"""Sensitive instructions that trap only where IA-32 is made virtualizable: segments and tables.

Source: Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual
Machine Monitor"; SDM 2, the instructions' own pages.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.arch.address import is_canonical
from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Interruptibility, Vmcs
from understudy.execution.deprivileged import descriptors
from understudy.execution.deprivileged.descriptors import LONG, NotHere
from understudy.execution.deprivileged.live import Live
from understudy.guest import RSP
from understudy.instructions.operands import LOW32, MASK64, operand_address, target
from understudy.silicon import Exit

NUMBERS: Final = {
    Register.ES: SegmentName.ES, Register.CS: SegmentName.CS, Register.SS: SegmentName.SS,
    Register.DS: SegmentName.DS, Register.FS: SegmentName.FS, Register.GS: SegmentName.GS,
}  # fmt: skip
SELECTOR: Final = int(Vmcs.GUEST_ES)
BIG: Final = 1 << 14
IF: Final = RFLAGS.IF.mask
AC, AM = RFLAGS.AC.mask, CR0.AM.mask
VIRTUAL: Final = int(RFLAGS(VIP=1, VIF=1))
"""Flags that a return sets only at level 0."""
NT, VM = RFLAGS.NT.mask, RFLAGS.VM.mask
IOPL: Final = 3 << 12
RETURNED: Final = int(RFLAGS(
    ID=1, AC=1, RF=1, NT=1, OF=1, DF=1, IF=1, TF=1, SF=1, ZF=1, AF=1, PF=1, CF=1
)) | IOPL  # fmt: skip
MOV_SS: Final = Interruptibility.MOV_SS.mask
NMI: Final = Interruptibility.NMI.mask
INTERRUPTIBILITY: Final = int(Vmcs.GUEST_INTERRUPTIBILITY_STATE)


def _done(guest: Live, instruction: iced.Instruction) -> None:
    guest.tick()
    guest.skip(instruction.len)


def operand(guest: Live, instruction: iced.Instruction, *, write: bool = False) -> int:
    """Where the operand in memory is.  NotHere: its segment is not flat, or does not allow it."""
    check(guest, NUMBERS[instruction.memory_segment], write=write)
    return operand_address(instruction, guest.code_bits())(guest)


def check(guest: Live, n: int, *, write: bool) -> None:
    """NotHere: this segment is not flat, or does not allow it; or alignment is checked."""
    _check_alignment(guest)
    if guest.is_code64():
        return
    _, _, limit, rights = guest.segment(n)
    is_writable = bool(rights & descriptors.READ_WRITE)
    if rights & descriptors.CODE:
        may = is_writable and not write  # of code the bit says that it is readable
    else:
        may = (is_writable or not write) and not rights & descriptors.CONFORMING  # expands down
    if not may or rights & descriptors.UNUSABLE or limit != LOW32:
        raise NotHere


def _check_alignment(guest: Live) -> None:
    """NotHere: each access of a program has to be aligned."""
    if guest.cpl() == 3 and guest.rflags & AC and guest.control().cr0 & AM:
        raise NotHere


# --- the stack ---


def _stack(guest: Live) -> tuple[int, int]:
    """The mask of its addresses and its base.  NotHere: it is not flat."""
    _check_alignment(guest)
    if guest.is_code64():
        return MASK64, 0
    segment = guest.segment(SegmentName.SS)
    if not segment.rights & BIG or segment.limit != LOW32 or segment.rights & 4:
        raise NotHere
    return LOW32, segment.base


def push(guest: Live, size: int, value: int) -> None:
    """A word onto the stack of the instruction that trapped."""
    mask, base = _stack(guest)
    sp = guest.gpr(RSP) - size & mask
    guest.memory().store(base + sp & mask, size, value & (1 << 8 * size) - 1)
    guest.set_gpr(RSP, sp)


def top(guest: Live, size: int, offset: int = 0) -> int:
    """A word of it."""
    mask, base = _stack(guest)
    return guest.memory().load(base + (guest.gpr(RSP) + offset & mask) & mask, size)


def drop(guest: Live, size: int) -> None:
    """So many bytes of it are used up."""
    mask, _ = _stack(guest)
    guest.set_gpr(RSP, guest.gpr(RSP) + size & mask)


# --- IRET ---


def iretq(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """IRETQ of 64-bit code, which always pops SS:RSP."""
    _check_iret(guest)
    rip, cs, flags, rsp, ss = (top(guest, 8, 8 * n) for n in range(5))
    old, level = guest.cpl(), cs & 3
    if level < old or (guest.shows_single_step(flags)):
        raise NotHere
    code = descriptors.code(guest, cs & 0xFFFF, level)
    is_long = bool(code.rights & LONG)
    if not (is_canonical(rip) if is_long else rip <= code.limit):
        raise NotHere
    stack = _returned_stack(guest, ss & 0xFFFF, level, is_long=is_long)
    _return(guest, level, code, rip, stack, rsp if is_long else rsp & LOW32, flags)
    return None


def iret(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """IRETD of 32-bit code."""
    if instruction.mnemonic != Mnemonic.IRETD or guest.is_long_mode():
        raise NotHere
    _check_iret(guest)
    eip, cs, flags = (top(guest, 4, 4 * n) for n in range(3))
    flags = flags | guest.rflags & ~LOW32
    old, level = guest.cpl(), cs & 3
    if level < old or flags & VM or guest.shows_single_step(flags):
        raise NotHere
    code = descriptors.code(guest, cs & 0xFFFF, level)
    if eip > code.limit:
        raise NotHere
    if level == old:
        stack, esp = guest.segment(SegmentName.SS), guest.gpr(RSP) + 12 & LOW32
    else:
        esp, ss = top(guest, 4, 12), top(guest, 4, 16)
        stack = descriptors.stack(guest, ss & 0xFFFF, level)
        if not stack.rights & BIG:
            raise NotHere
    _return(guest, level, code, eip, stack, esp, flags)
    return None


def _check_iret(guest: Live) -> None:
    if guest.rflags & NT or guest.read(INTERRUPTIBILITY) & NMI:
        raise NotHere
    _stack(guest)


def _returned_stack(guest: Live, selector: int, level: int, *, is_long: bool) -> Segment:
    if selector & ~3:
        return descriptors.stack(guest, selector, level)
    if not is_long or level == 3 or selector & 3 != level:
        raise NotHere
    return descriptors.null_stack(level)


def _return(
    guest: Live, level: int, code: Segment, rip: int, stack: Segment, rsp: int, flags: int
) -> None:
    old_level, old = guest.cpl(), guest.rflags
    mask = RETURNED
    if old_level > old >> 12 & 3:
        mask &= ~IF
    mask = mask & ~IOPL if old_level else mask | VIRTUAL
    code, stack = descriptors.marked(guest, code), descriptors.marked(guest, stack)
    guest.set_live_segment(SegmentName.SS, stack)
    guest.set_live_segment(SegmentName.CS, code)
    if level > old_level:
        descriptors.leave_inner_data(guest, level)
    guest.rflags = old & ~mask | flags & mask | 2
    guest.set_gpr(RSP, rsp)
    guest.rip = rip
    guest.tick()
    guest.note_skip()


# --- MOV, PUSH, POP of segment registers ---


def mov_from(guest: Live, instruction: iced.Instruction) -> None:
    """MOV from a segment register."""
    selector = guest.read(SELECTOR + 2 * NUMBERS[instruction.op1_register])
    _store(guest, instruction, selector)


def _store(guest: Live, instruction: iced.Instruction, value: int) -> None:
    """To the first operand; into memory only 16 bits."""
    if instruction.op0_kind == OpKind.MEMORY:
        guest.memory().store(operand(guest, instruction, write=True), 2, value & 0xFFFF)
    else:
        write = target(instruction, 0)
        if write is None:
            raise NotHere
        write(guest, value)
    _done(guest, instruction)


def mov_to(guest: Live, instruction: iced.Instruction) -> None:
    """MOV to a segment register."""
    n = NUMBERS[instruction.op0_register]
    if instruction.op1_kind == OpKind.MEMORY:
        selector = guest.memory().load(operand(guest, instruction), 2)
    else:
        selector = guest.gpr(iced.RegisterExt.number(instruction.op1_register)) & 0xFFFF
    _load(guest, n, selector)
    _done(guest, instruction)
    if n == SegmentName.SS:
        guest.begin_shadow(MOV_SS)


def _load(guest: Live, n: int, selector: int) -> None:
    if n == SegmentName.CS:
        raise NotHere
    if n == SegmentName.SS:
        level = guest.cpl()
        if selector & ~3:
            segment = descriptors.stack(guest, selector, level)
        elif guest.is_code64() and level < 3 and selector & 3 == level:
            segment = descriptors.null_stack(level)
        else:
            raise NotHere
    else:
        segment = descriptors.data(guest, selector)
    guest.set_live_segment(n, descriptors.marked(guest, segment))


def push_segment(guest: Live, instruction: iced.Instruction) -> None:
    """PUSH of a segment register."""
    size = -instruction.stack_pointer_increment
    selector = guest.read(SELECTOR + 2 * NUMBERS[instruction.op0_register])
    push(guest, size, selector)
    _done(guest, instruction)


def pop_segment(guest: Live, instruction: iced.Instruction) -> None:
    """POP of a segment register."""
    n, size = NUMBERS[instruction.op0_register], instruction.stack_pointer_increment
    selector, (mask, _) = top(guest, size) & 0xFFFF, _stack(guest)
    _load(guest, n, selector)
    guest.set_gpr(RSP, guest.gpr(RSP) + size & mask)  # of the stack that it was
    _done(guest, instruction)
    if n == SegmentName.SS:
        guest.begin_shadow(MOV_SS)


CarryOut = Callable[[Live, iced.Instruction], None]
MOVES: Final[dict[tuple[str, int], CarryOut]] = {
    ("MOV", 0): mov_to, ("MOV", 1): mov_from, ("PUSH", 0): push_segment, ("POP", 0): pop_segment,
}  # fmt: skip
"""By mnemonic, and the operand that is a segment register."""


# --- system registers that programs may read ---


def store_table(guest: Live, instruction: iced.Instruction) -> None:
    """SGDT, SIDT."""
    table = guest.gdtr() if instruction.mnemonic == Mnemonic.SGDT else guest.idtr()
    if guest.cpl():
        raise NotHere  # CR4.UMIP may forbid it
    size = 10 if guest.is_code64() else 6
    value = table.limit | (table.base & (MASK64 if size == 10 else LOW32)) << 16
    guest.memory().store(operand(guest, instruction, write=True), size, value)
    _done(guest, instruction)


def smsw(guest: Live, instruction: iced.Instruction) -> None:
    """SMSW."""
    if guest.cpl():
        raise NotHere
    _store(guest, instruction, guest.control().cr0)


def store_selector(guest: Live, instruction: iced.Instruction) -> None:
    """SLDT, STR."""
    if guest.cpl():
        raise NotHere
    n = SegmentName.LDTR if instruction.mnemonic == Mnemonic.SLDT else SegmentName.TR
    _store(guest, instruction, guest.read(SELECTOR + 2 * n))
