"""String instructions: elements of memory, RAM or device, one after the other.

Source: SDM 1, "String Operations"; SDM 2, "REP/REPE/REPZ/REPNE/REPNZ - Repeat String Operation
Prefix" and the instructions' own pages.

Invariants: a page fault leaves the registers as after the last whole element, but the flags as
before the instruction; of an element that faults nothing is read from a device or written; a burst
is at most `BURST` elements, so that events can come in between.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.arch.address import PAGE
from understudy.guest import Guest
from understudy.instructions.arithmetic import OPERATIONS, ZF, Compute, computer
from understudy.instructions.operands import (
    ACCUMULATORS,
    LOW32,
    MASK64,
    Read,
    advance,
    pieces,
    reader,
    segment_base,
    writer,
)
from understudy.instructions.surroundings import Surroundings, load, store
from understudy.paging.guest_walk import GuestFault

BURST: Final = 1024
DF: Final = 1 << 10
TF: Final = 1 << 8
BREAKPOINTS: Final = 0xFF  # of DR7: those that are enabled
RAX, RCX, RSI, RDI = 0, 1, 6, 7

MOVS: Final = (Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ)
STOS: Final = (Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ)
LODS: Final = (Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ)
CMPS: Final = (Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ)
SCAS: Final = (Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD, Mnemonic.SCASQ)
FAMILY: Final = {name: family for family in (MOVS, STOS, LODS, CMPS, SCAS) for name in family}
AT_SOURCE: Final = {
    OpKind.MEMORY_SEG_SI: 0xFFFF, OpKind.MEMORY_SEG_ESI: LOW32, OpKind.MEMORY_SEG_RSI: MASK64,
}  # fmt: skip
AT_TARGET: Final = {
    OpKind.MEMORY_ESDI: 0xFFFF, OpKind.MEMORY_ESEDI: LOW32, OpKind.MEMORY_ESRDI: MASK64,
}  # fmt: skip
ADDRESSES: Final = AT_SOURCE | AT_TARGET  # what of a register is the address


class StringPlan(NamedTuple):
    """A decoded string instruction.  `source`, `target`: bases of its segments, if not 0."""

    family: tuple[int, ...]
    size: int  # bytes of an element
    mask: int  # what of RSI, RDI and RCX counts
    source: Read | None
    target: Read | None
    repeats: bool
    ends_on: int | None  # the value of ZF with which a comparison ends the repetition
    compare: Compute
    is_64: bool


def string_plan(instruction: iced.Instruction, bits: int) -> StringPlan | None:
    """None: it is none of the five."""
    family = FAMILY.get(instruction.mnemonic)
    kinds = [instruction.op_kind(n) for n in range(instruction.op_count)]
    masks = [ADDRESSES[kind] for kind in kinds if kind in ADDRESSES]
    if family is None or not masks:  # the latter are MOVSD and CMPSD of SSE2
        return None
    size = 1 << family.index(instruction.mnemonic)
    ends_on = None
    if family in (CMPS, SCAS):
        ends_on = ZF if instruction.has_repne_prefix else 0
    return StringPlan(
        family, size, masks[0],
        segment_base(instruction.memory_segment, bits) if family not in (STOS, SCAS) else None,
        segment_base(Register.ES, bits),
        instruction.has_rep_prefix or instruction.has_repne_prefix,
        ends_on, computer(OPERATIONS[Mnemonic.CMP], 8 * size), bits == 64,
    )  # fmt: skip


class Places:
    """Where linear addresses lie, for the length of one burst: each page is walked once."""

    def __init__(self, around: Surroundings) -> None:
        self.around, self.translation = around, around.translation()
        self.pages: dict[tuple[int, bool], int] = {}

    def find(self, gva: int, size: int, *, write: bool) -> list[tuple[int, int]]:
        """(gpa, bytes) in each page.  GuestFault if the access is refused."""
        return [(self._gpa(at, write), n) for at, n in pieces(gva, size)]

    def _gpa(self, gva: int, write: bool) -> int:
        page, offset = gva & -PAGE, gva & PAGE - 1
        known = self.pages.get((page, write))
        if known is None:
            gpa = self.translation.gpa(self.around.memory, gva, write=write)
            if write:
                self.around.memory.expect_write(gpa)
            known = self.pages[page, write] = gpa - offset
        return known + offset

    def load(self, places: list[tuple[int, int]]) -> bytes:
        """The bytes there."""
        if len(places) == 1:
            return load(self.around, *places[0])
        return b"".join(load(self.around, gpa, n) for gpa, n in places)

    def store(self, places: list[tuple[int, int]], data: bytes) -> None:
        """Write them."""
        for gpa, n in places:
            store(self.around, gpa, data[:n])
            data = data[n:]


def burst(around: Surroundings, plan: StringPlan, cost: int) -> bool:
    """At most `BURST` elements, each taking `cost` of time.  False if more are left to do.

    GuestFault if an element may not be accessed; those before it are done.
    """
    guest, mask = around.guest, plan.mask
    left = guest.gpr(RCX) & mask if plan.repeats else 1
    before = guest.rflags
    most = 1 if goes_by_elements(guest) else BURST
    count, done, is_over = min(left, most), 0, left <= most
    step = -plan.size if before & DF else plan.size
    elements = Elements(around, plan)
    try:
        while done < count:
            elements.one()
            done += 1
            elements.advance(step)
            if plan.repeats:
                advance(guest, RCX, -1, mask)
                if plan.ends_on is not None and guest.rflags & ZF == plan.ends_on:
                    is_over = True
                    break
    except GuestFault:
        guest.rflags = before
        raise
    finally:
        around.spend(done * cost)
    if not is_over and most > 1:
        guest.rflags = before
    return is_over


def end_burst(around: Surroundings) -> None:
    """The instruction is not finished: the processor goes on with it, as after an interrupt.

    Its interrupt shadow is over.  The frame of a single step's trap has RF set (SDM 3B,
    "Instruction-Breakpoint Exception Condition").
    """
    guest = around.guest
    guest.skip(0)
    if goes_by_elements(guest):
        guest.set_resume_flag(True)
        around.events.note_trap()


def goes_by_elements(guest: Guest) -> bool:
    """Debug conditions are looked at after each element: single step, breakpoints."""
    return bool(guest.rflags & TF or guest.dr7 & BREAKPOINTS)


class Elements:
    """The elements of one burst, by the registers as they are now."""

    def __init__(self, around: Surroundings, plan: StringPlan) -> None:
        self.guest, self.plan, self.places = around.guest, plan, Places(around)
        family = plan.family
        self.source = plan.source(self.guest) if plan.source is not None else 0
        self.target = plan.target(self.guest) if plan.target is not None else 0
        self.registers = [RSI] * (family not in (STOS, SCAS)) + [RDI] * (family is not LODS)
        self.accumulator = reader(ACCUMULATORS[plan.size])
        self.accumulate = writer(ACCUMULATORS[plan.size])
        actions: dict[tuple[int, ...], Callable[[], None]] = {
            MOVS: self._move, STOS: self._store, LODS: self._load, CMPS: self._compare,
            SCAS: self._scan,
        }  # fmt: skip
        self.one = actions[family]

    def advance(self, step: int) -> None:
        """Go to the next element."""
        for number in self.registers:
            advance(self.guest, number, step, self.plan.mask)

    def _at_source(self) -> list[tuple[int, int]]:
        return self._at(self.source, RSI, write=False)

    def _at_target(self, *, write: bool) -> list[tuple[int, int]]:
        return self._at(self.target, RDI, write=write)

    def _at(self, base: int, register: int, *, write: bool) -> list[tuple[int, int]]:
        gva = base + (self.guest.gpr(register) & self.plan.mask)
        gva &= MASK64 if self.plan.is_64 else LOW32
        return self.places.find(gva, self.plan.size, write=write)

    def _move(self) -> None:
        source = self._at_source()
        target = self._at_target(write=True)
        self.places.store(target, self.places.load(source))

    def _store(self) -> None:
        value = self.accumulator(self.guest)
        self.places.store(self._at_target(write=True), value.to_bytes(self.plan.size, "little"))

    def _load(self) -> None:
        data = self.places.load(self._at_source())
        self.accumulate(self.guest, int.from_bytes(data, "little"))

    def _compare(self) -> None:
        source, target = self._at_source(), self._at_target(write=False)
        self._note(self.places.load(source), self.places.load(target))

    def _scan(self) -> None:
        value = self.accumulator(self.guest).to_bytes(self.plan.size, "little")
        self._note(value, self.places.load(self._at_target(write=False)))

    def _note(self, left: bytes, right: bytes) -> None:
        a, b = int.from_bytes(left, "little"), int.from_bytes(right, "little")
        self.guest.rflags = self.plan.compare(a, b, self.guest.rflags)[1]
