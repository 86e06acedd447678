"""Sensitive instructions that slip through: IA-32 executes them above CPL 0, and they say it.

The processor stops before each of them that a guest's kernel comes to (`Processor.set_ring0`,
"stop"), and it is compared with what it would have been at the guest's own level: what it stores,
or what of it has no effect.  Where that differs it is harmful, and named.  Then it executes.

Source: Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual
Machine Monitor"; lecture, "Dealing with problematic ISAs".
Invariant: looking changes nothing of the guest.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.segment import SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.execution.deprivileged import descent, segments
from understudy.execution.deprivileged.descriptors import NotHere, table_entry
from understudy.execution.deprivileged.live import Live
from understudy.instructions.operands import MASK64, operand_address
from understudy.paging.guest_walk import GuestFault

ENOUGH: Final = 32  # harmful sites after which a run is not worth going on
PATIENCE: Final = 20_000_000  # instructions after the first harmful one: it may hang
NEVER: Final = 1 << 64
SELECTOR: Final = int(Vmcs.GUEST_ES)
M: Final = Mnemonic
Look = Callable[[Live, iced.Instruction], str]
"""What goes wrong; nothing if nothing does."""


class Slips:
    """Where they are, how often they were executed, and what went wrong."""

    def __init__(self) -> None:
        self.harmful: dict[tuple[int, str], tuple[str, int]] = {}  # by address and name
        self.harmless = 0
        self.end = NEVER  # what will have retired when it is over

    def note(self, rip: int, name: str, harm: str, retired: int) -> None:
        """One is going to be executed, after so many instructions."""
        if not harm:
            self.harmless += 1
            return
        words, often = self.harmful.get((rip, name), (harm, 0))
        self.harmful[rip, name] = words, often + 1
        if len(self.harmful) >= ENOUGH:
            self.end = 0
        elif self.end == NEVER:
            self.end = retired + PATIENCE

    def is_over(self, retired: int) -> bool:
        """Whether the guest does, by now, what it would not do on a processor of its own."""
        return retired >= self.end

    def report(self, where: Callable[[int], str]) -> str:
        """What went wrong, the first first.  `where`: how people call an address."""
        lines = [
            f"  {name} at {where(rip)}, {often} times: {words}"
            for (rip, name), (words, often) in self.harmful.items()
        ]
        return "\n".join([
            "this ISA cannot be virtualized so: sensitive instructions executed without a trap "
            f"({self.harmless} others did no harm); with --virtualizable-isa they would trap",
            *lines,
        ])  # fmt: skip


def look(guest: Live, instruction: iced.Instruction) -> str:
    """What goes wrong when this one executes; nothing if nothing does."""
    found = LOOKS.get(instruction.mnemonic)
    if found is None and instruction.mnemonic in (M.MOV, M.PUSH):
        found = _reads_segment
    try:
        return found(guest, instruction) if found is not None else ""
    except (GuestFault, NotHere):
        return ""  # it faults, and that traps


def _pushf(guest: Live, instruction: iced.Instruction) -> str:
    real, own = descent.down(guest.rflags), guest.rflags
    return _differing("pushed", own, real)


def _popf(guest: Live, instruction: iced.Instruction) -> str:
    value = segments.top(guest, instruction.stack_pointer_increment)
    return _differing("left", value, guest.rflags)


def _differing(what: str, own: int, real: int) -> str:
    names = [("IF", own >> 9 & 1, real >> 9 & 1), ("IOPL", own >> 12 & 3, real >> 12 & 3)]
    return ", ".join(
        f"{what} {name}={after}, not {before}" for name, before, after in names if before != after
    )


def _store_table(guest: Live, instruction: iced.Instruction) -> str:
    name = "GDTR" if instruction.mnemonic == M.SGDT else "IDTR"
    own = guest.gdtr() if name == "GDTR" else guest.idtr()
    return f"stored the hypervisor's {name}, not {own.base:#x}:{own.limit:#x}"


def _store_selector(guest: Live, instruction: iced.Instruction) -> str:
    is_ldt = instruction.mnemonic == M.SLDT
    own = guest.segment(SegmentName.LDTR if is_ldt else SegmentName.TR).selector
    real = descent.NO_TABLES["ldtr" if is_ldt else "tr"]
    return "" if own == real else f"stored {real:#x}, not {own:#x}"


def _smsw(guest: Live, instruction: iced.Instruction) -> str:
    is_word = instruction.op0_kind == OpKind.MEMORY or (
        iced.RegisterExt.size(instruction.op0_register) == 2
    )
    mask = 0xFFFF if is_word else MASK64
    own, real = guest.control().cr0 & mask, guest.real_control().cr0 & mask
    return "" if own == real else f"stored CR0={real:#x}, not {own:#x}"


def _asks_descriptor(guest: Live, instruction: iced.Instruction) -> str:
    """LAR, LSL, VERR, VERW: in the hypervisor's empty table they find nothing."""
    n = instruction.op_count - 1
    if instruction.op_kind(n) == OpKind.MEMORY:
        at = operand_address(instruction, guest.code_bits())(guest)
        selector = guest.memory().load(at, 2)
    else:
        selector = guest.gpr(iced.RegisterExt.number(instruction.op_register(n))) & 0xFFFF
    if not selector & ~3:
        return ""
    guest.kernel_memory().load(table_entry(guest, selector), 8)
    return f"found no descriptor for selector {selector:#x}, which has one"


def _reads_segment(guest: Live, instruction: iced.Instruction) -> str:
    register = instruction.op_register(instruction.op_count - 1)
    if register not in segments.NUMBERS:
        return ""  # a load: of a null selector, which has the same effect, or it traps
    n = segments.NUMBERS[register]
    own = guest.read(SELECTOR + 2 * n)
    if n not in descent.LEVELS:
        return ""
    real = own & ~descent.RPL | descent.real_level(guest.cpl())
    return "" if own == real else f"read {register_name(n)}={real:#x}, not {own:#x}"


def register_name(n: int) -> str:
    """The name of a segment register."""
    return SegmentName(n).name


LOOKS: Final[dict[int, Look]] = {
    M.PUSHF: _pushf, M.PUSHFD: _pushf, M.PUSHFQ: _pushf, M.POPF: _popf, M.POPFD: _popf,
    M.POPFQ: _popf, M.SGDT: _store_table, M.SIDT: _store_table, M.SLDT: _store_selector,
    M.STR: _store_selector, M.SMSW: _smsw, M.LAR: _asks_descriptor, M.LSL: _asks_descriptor,
    M.VERR: _asks_descriptor, M.VERW: _asks_descriptor,
}  # fmt: skip
"""Of all others a load of a segment register that is not null traps, for the GDT is empty."""
