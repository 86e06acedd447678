"""Segment registers: loaded from descriptors, and read.

Source: SDM 3A, "Segmentation", "Segment Descriptors", "Segment Registers"; SDM 2, "MOV", "POP",
"LDS/LES/LFS/LGS/LSS".

Invariants: a load marks the descriptor as accessed, as the processor does; whatever does not pass
the checks, and what depends on more than a descriptor of code or data, is NotHere and has changed
nothing.
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.cr import RFLAGS
from understudy.arch.segment import Segment, SegmentName
from understudy.guest import RSP
from understudy.instructions.access import Load, Store, getter, operand_size, putter
from understudy.instructions.operands import SEGMENTS, Read, effective_address, target
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_limits import address_mask
from understudy.instructions.stack import Flow, stack_of
from understudy.instructions.task_switch import (
    ACCESSED,
    CODE_TYPE,
    CONFORMING,
    PRESENT,
    READ_WRITE,
    UNUSABLE,
    Descriptor,
)

VM, AC = RFLAGS.VM.mask, RFLAGS.AC.mask
SS, LDTR = int(SegmentName.SS), int(SegmentName.LDTR)
MEMORY: Final = 0x10  # S of a descriptor's rights: code or data
FAR_LOADS: Final = {
    Mnemonic.LDS: SegmentName.DS, Mnemonic.LES: SegmentName.ES, Mnemonic.LFS: SegmentName.FS,
    Mnemonic.LGS: SegmentName.GS, Mnemonic.LSS: SegmentName.SS,
}  # fmt: skip


def descriptor(r: Program, selector: int, load: Load) -> tuple[Descriptor, int]:
    """(what a selector that is not null names, the linear address of its descriptor)."""
    if selector & 4:
        _, base, limit, rights = r.guest.segment(LDTR)
        if rights & UNUSABLE:
            raise NotHere
    else:
        base, limit = r.guest.gdtr()
    if not selector & ~3 or selector | 7 > limit:
        raise NotHere
    at = base + (selector & ~7)
    return Descriptor.of(load(at, 8)), at


def marked(found: Descriptor, at: int, store: Store) -> Descriptor:
    """The same, marked as accessed in its table."""
    if found.rights & ACCESSED:
        return found
    found = found._replace(rights=found.rights | ACCESSED)
    store(at + 5, 1, found.rights & 0xFF)
    return found


def real_segment(old: Segment, selector: int) -> Segment:
    """What a segment register becomes in real-address mode: limit and rights stay."""
    granularity = 1 << 15 if old.limit > 0xF_FFFF else 0  # a null one keeps its limit
    rights = 0x93 | granularity if old.rights & UNUSABLE else old.rights
    return Segment(selector, selector << 4, old.limit, rights)


def segment_of(r: Program, n: int, selector: int, load: Load, store: Store) -> Segment:
    """What a load of DS, ES, FS, GS or SS with this selector makes of it."""
    if r.is_real:
        return real_segment(r.guest.segment(n), selector)
    if r.rflags & (VM | AC) or r.cpl == 3:
        raise NotHere  # the processor reads tables as a supervisor
    if not selector & ~3:
        if n != SS:
            return Segment(selector, 0, 0, UNUSABLE)
        raise NotHere
    found, at = descriptor(r, selector, load)
    kind, rpl = found.kind, selector & 3
    if not found.rights & PRESENT or not kind & MEMORY:
        raise NotHere
    if n == SS:
        fits = kind & (CODE_TYPE | READ_WRITE) == READ_WRITE and rpl == found.dpl == r.cpl
    else:
        is_code = bool(kind & CODE_TYPE)
        is_free = is_code and bool(kind & CONFORMING)
        fits = (not is_code or bool(kind & READ_WRITE)) and (
            is_free or max(rpl, r.cpl) <= found.dpl
        )
    if not fits:
        raise NotHere
    return Segment(selector, *marked(found, at, store))


def _mov(instruction: iced.Instruction, bits: int) -> Flow | None:
    """MOV to or from a segment register."""
    to, of = SEGMENTS.get(instruction.op0_register), SEGMENTS.get(instruction.op1_register)
    if instruction.op0_kind == OpKind.REGISTER and to is not None:
        get, number = getter(instruction, 1), int(to)
        if get is None or to is SegmentName.CS:
            return None

        def mov(r: Program, at: int, load: Load, store: Store) -> None:
            selector = get(r, at, load) & 0xFFFF
            r.load_segment(number, segment_of(r, number, selector, load, store))
            if number == SS:
                r.shadow(by_stack=True)

        return mov
    if instruction.op1_kind == OpKind.REGISTER and of is not None:
        put, source = putter(instruction, 0), int(of)
        if put is None:
            return None
        return lambda r, at, load, store: put(r, at, store, r.selector(source))
    return None


def _pop(instruction: iced.Instruction, bits: int) -> Flow | None:
    segment = SEGMENTS.get(instruction.op0_register)
    if instruction.op0_kind != OpKind.REGISTER or segment is None:
        return None
    number, size = int(segment), instruction.stack_pointer_increment
    place, pointer = stack_of(bits)

    def pop(r: Program, at: int, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        selector = load(place(r, sp, size, False), size) & 0xFFFF
        new = segment_of(r, number, selector, load, store)
        r.set_gpr(RSP, pointer(r, sp + size))
        r.load_segment(number, new)
        if number == SS:
            r.shadow(by_stack=True)

    return pop


def _far_load(instruction: iced.Instruction, bits: int) -> Flow | None:
    """LDS and its kin."""
    number, size = int(FAR_LOADS[instruction.mnemonic]), operand_size(instruction, 0)
    write, place = target(instruction, 0), FarPointer(instruction, bits, size)
    if write is None:
        return None

    def far_load(r: Program, at: int, load: Load, store: Store) -> None:
        offset, selector = place(r, load)
        r.load_segment(number, segment_of(r, number, selector, load, store))
        write(r, offset)

    return far_load


class FarPointer:
    """A far pointer that is a memory operand: an offset of `size` bytes, then a selector."""

    def __init__(self, instruction: iced.Instruction, bits: int, size: int) -> None:
        self.number, self.size = int(SEGMENTS[instruction.memory_segment]), size
        self.offset: Read = effective_address(instruction)
        self.mask, self.bits = address_mask(instruction), bits

    def __call__(self, r: Program, load: Load) -> tuple[int, int]:
        """(offset, selector)."""
        at = self.offset(r)
        after = at + self.size & self.mask
        if self.bits == 64:
            base = r.segment_base(self.number) if self.number >= SegmentName.FS else 0
            return load(base + at, self.size), load(base + after, 2)
        offset = load(r.place(self.number, at, self.size, False), self.size)
        return offset, load(r.place(self.number, after, 2, False), 2)


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out an instruction of this group.  None: it is of another, or not here."""
    if instruction.mnemonic == Mnemonic.MOV:
        return _mov(instruction, bits)
    if instruction.mnemonic == Mnemonic.POP:
        return _pop(instruction, bits)
    return _far_load(instruction, bits) if instruction.mnemonic in FAR_LOADS else None
