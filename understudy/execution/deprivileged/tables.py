"""Instructions on descriptor tables, debug registers and address spaces, and near-level far jumps.

Source: SDM 2, "LAR", "LSL", "VERR", "LLDT", "LTR", "INVPCID", "MOV - Move to/from Debug Registers",
"JMP", "RET".
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.address import is_canonical
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.segment import Segment, SegmentName
from understudy.execution.deprivileged import descriptors, segments
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descriptors import CODE, LONG, PLAIN, PRESENT, NotHere
from understudy.execution.deprivileged.live import Live
from understudy.guest import Event, Kind
from understudy.instructions.operands import (
    LOW32,
    MASK64,
    effective_address,
    target,
)
from understudy.silicon import Exit

CONFORMING_CODE: Final = CODE | descriptors.CONFORMING
READ_WRITE: Final = descriptors.READ_WRITE
ZF: Final = RFLAGS.ZF.mask
TYPE: Final = 0x1F  # of access rights, with S
LDT, TSS_AVAILABLE, BUSY = 0x2, 0x9, 0x2
LAR_MASK: Final = 0x00F0_FF00
DR7_KEPT, DR7_SET, GENERAL_DETECT = 0xFFFF_23FF, 0x400, 1 << 13
NO_BASE_NO_INDEX: Final = 1 << 27 | 1 << 22  # of the instruction information of INVPCID
CR4_DE_ALIASES: Final = (4, 5)


def _done(guest: Live, instruction: iced.Instruction) -> None:
    guest.tick()
    guest.skip(instruction.len)


def _selector(guest: Live, instruction: iced.Instruction, n: int) -> int:
    if instruction.op_kind(n) == OpKind.MEMORY:
        return guest.memory().load(segments.operand(guest, instruction), 2)
    return guest.gpr(iced.RegisterExt.number(instruction.op_register(n))) & 0xFFFF


# --- questions ---


def ask(guest: Live, instruction: iced.Instruction) -> None:
    """LAR, LSL, VERR, VERW of a null selector or of one of a code or data segment."""
    selector = _selector(guest, instruction, instruction.op_count - 1)
    raw = 0
    if selector & ~3:
        raw = guest.kernel_memory().load(descriptors.table_entry(guest, selector), 8)
        if not raw >> 40 & PLAIN:
            raise NotHere
    visible = bool(raw) and _is_visible(guest, instruction.mnemonic, selector, raw >> 40 & 0xFF)
    if visible and instruction.mnemonic in (Mnemonic.LAR, Mnemonic.LSL):
        write = target(instruction, 0)
        assert write is not None
        limit = descriptors.unpack(selector, raw).limit
        write(guest, raw >> 32 & LAR_MASK if instruction.mnemonic == Mnemonic.LAR else limit)
    guest.rflags = guest.rflags & ~ZF | ZF * visible
    _done(guest, instruction)


def _is_visible(guest: Live, mnemonic: int, selector: int, rights: int) -> bool:
    is_conforming = rights & CONFORMING_CODE == CONFORMING_CODE
    if not is_conforming and rights >> 5 & 3 < max(guest.cpl(), selector & 3):
        return False
    if mnemonic == Mnemonic.VERR:
        return not rights & CODE or bool(rights & READ_WRITE)
    return mnemonic != Mnemonic.VERW or rights & (CODE | READ_WRITE) == READ_WRITE


# --- LDTR and TR ---


def _system_descriptor(guest: Live, selector: int) -> tuple[int, Segment]:
    """Where it is, and what: of the GDT, present, in IA-32e mode with an upper half."""
    if selector & descriptors.IN_LDT:
        raise NotHere
    at, memory = descriptors.table_entry(guest, selector), guest.kernel_memory()
    segment = descriptors.unpack(selector, memory.load(at, 8))
    if guest.is_long_mode():
        descriptors.table_entry(guest, selector + 8)
        upper = memory.load(at + 8, 8)
        segment = segment._replace(base=segment.base | (upper & LOW32) << 32)
        if upper >> 40 & TYPE or not is_canonical(segment.base):
            raise NotHere
    if not segment.rights & PRESENT:
        raise NotHere
    return at, segment


def lldt(guest: Live, instruction: iced.Instruction) -> None:
    """LLDT."""
    selector = _selector(guest, instruction, 0)
    segment = Segment(selector, 0, 0, descriptors.UNUSABLE)
    if selector & ~3:
        _, segment = _system_descriptor(guest, selector)
        if segment.rights & TYPE != LDT:
            raise NotHere
    guest.set_live_segment(SegmentName.LDTR, segment)
    _done(guest, instruction)


def ltr(guest: Live, instruction: iced.Instruction) -> None:
    """LTR."""
    selector = _selector(guest, instruction, 0)
    if not selector & ~3:
        raise NotHere
    at, segment = _system_descriptor(guest, selector)
    if segment.rights & TYPE != TSS_AVAILABLE:
        raise NotHere
    rights = segment.rights | BUSY
    guest.kernel_memory().store(at + 5, 1, rights & 0xFF)
    guest.set_live_segment(SegmentName.TR, segment._replace(rights=rights))
    _done(guest, instruction)


# --- far jumps and returns inside a level ---


def jump(guest: Live, instruction: iced.Instruction) -> None:
    """JMP far to a code segment of the same level."""
    if instruction.op0_kind == OpKind.FAR_BRANCH32:
        selector, rip = instruction.far_branch_selector, instruction.far_branch32
    elif instruction.op0_kind == OpKind.MEMORY:
        size = iced.MemorySizeExt.size(instruction.memory_size) - 2
        if size not in (4, 8):
            raise NotHere
        at, memory = segments.operand(guest, instruction), guest.memory()
        selector, rip = memory.load(at + size, 2), memory.load(at, size)
    else:
        raise NotHere
    if selector & 3 > guest.cpl():
        raise NotHere
    _go(guest, selector, rip)


def far_return(guest: Live, instruction: iced.Instruction) -> None:
    """RETF inside a level."""
    if instruction.op_count or instruction.code not in (iced.Code.RETFD, iced.Code.RETFQ):
        raise NotHere
    size = 4 if instruction.code == iced.Code.RETFD else 8
    rip, selector = segments.top(guest, size), segments.top(guest, size, size) & 0xFFFF
    if selector & 3 != guest.cpl():
        raise NotHere
    _go(guest, selector, rip, drops=2 * size)


def _go(guest: Live, selector: int, rip: int, drops: int = 0) -> None:
    if not selector & ~3:
        raise NotHere
    code = descriptors.code(guest, selector, guest.cpl())
    if not (is_canonical(rip) if code.rights & LONG else rip <= code.limit):
        raise NotHere
    code = descriptors.marked(guest, code)
    if drops:
        segments.drop(guest, drops)
    guest.set_live_segment(SegmentName.CS, code)
    guest.rip = rip
    guest.tick()
    guest.note_skip()


# --- debug registers, address spaces ---


def mov_dr(guest: Live, instruction: iced.Instruction) -> None:
    """MOV to and from debug registers."""
    reads = iced.RegisterExt.is_dr(instruction.op1_register)
    register = instruction.op1_register if reads else instruction.op0_register
    other = instruction.op0_register if reads else instruction.op1_register
    number, gpr = iced.RegisterExt.number(register), iced.RegisterExt.number(other)
    if number in CR4_DE_ALIASES or guest.dr7 & GENERAL_DETECT:
        raise NotHere
    if reads:
        guest.set_gpr(gpr, guest.dr7 if number == 7 else guest.processor.registers()[f"dr{number}"])
        _done(guest, instruction)
        return
    value = guest.gpr(gpr) & (MASK64 if guest.is_code64() else LOW32)
    if number > 5 and value >> 32:
        raise NotHere
    _done(guest, instruction)
    if number == 7:
        guest.dr7 = value & DR7_KEPT | DR7_SET
    else:
        guest.processor.set_registers({f"dr{number}": value})


def invpcid(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """INVPCID."""
    if "invpcid" not in guest.model.shown:
        guest.reflect(Event(Vector.UD, Kind.EXCEPTION))
        return None
    guest.forget_walks()
    bits = guest.code_bits()
    segment = segments.NUMBERS[instruction.memory_segment]
    info = NO_BASE_NO_INDEX | iced.RegisterExt.number(instruction.op0_register) << 28
    info |= segment << 15 | (2 if bits == 64 else 1) << 7
    offset = effective_address(instruction)(guest)
    return question(Reason.INVPCID, offset, length=instruction.len, instr_info=info)
