"""Flags that privilege guards: CLI, STI, PUSHF, POPF, CLAC, STAC.

Source: SDM 2, the instructions' own pages; SDM 3A, "Protected-Mode Virtual Interrupts".

Invariants: with the privilege that a program has, it changes the flags that it may and no others;
what depends on virtual interrupts (VME, PVI) or would fault is NotHere.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.cr import RFLAGS
from understudy.guest import RSP
from understudy.instructions.access import Load, Store
from understudy.instructions.arithmetic import AF, CF, OF, PF, SF, ZF
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.stack import Flow, Stack, stack_of

IF, VM, RF, AC, ID, NT, TF, DF = (
    RFLAGS.IF.mask, RFLAGS.VM.mask, RFLAGS.RF.mask, RFLAGS.AC.mask, RFLAGS.ID.mask,
    RFLAGS.NT.mask, RFLAGS.TF.mask, RFLAGS.DF.mask,
)  # fmt: skip
IOPL: Final = 3 << 12
IOPL_SHIFT: Final = 12
FIXED: Final = 2
PLAIN16: Final = CF | PF | AF | ZF | SF | OF | TF | DF | NT
"""What POPF and IRET may change at any level, with an operand size of 16 bits."""


def is_trusted(r: Program) -> bool:
    """CPL <= IOPL: the program may change IF."""
    return r.cpl <= (r.rflags & IOPL) >> IOPL_SHIFT


def _cli(instruction: iced.Instruction, stack: Stack) -> Flow:
    def cli(r: Program, at: int, load: Load, store: Store) -> None:
        if not is_trusted(r):
            raise NotHere
        r.rflags &= ~IF

    return cli


def _sti(instruction: iced.Instruction, stack: Stack) -> Flow:
    def sti(r: Program, at: int, load: Load, store: Store) -> None:
        if not is_trusted(r):
            raise NotHere
        if not r.rflags & IF:
            r.rflags |= IF
            r.shadow()

    return sti


def _pushf(instruction: iced.Instruction, stack: Stack) -> Flow:
    size = {Mnemonic.PUSHF: 2, Mnemonic.PUSHFD: 4}.get(instruction.mnemonic, 8)
    mask, (place, pointer) = (1 << 8 * size) - 1 & ~(VM | RF), stack

    def pushf(r: Program, at: int, load: Load, store: Store) -> None:
        if r.rflags & VM:
            raise NotHere
        sp = r.gpr(RSP) - size
        store(place(r, sp, size, True), size, r.rflags & mask)
        r.set_gpr(RSP, pointer(r, sp))

    return pushf


def _popf(instruction: iced.Instruction, stack: Stack) -> Flow:
    size = {Mnemonic.POPF: 2, Mnemonic.POPFD: 4}.get(instruction.mnemonic, 8)
    plain, (place, pointer) = PLAIN16 | (AC | ID if size > 2 else 0), stack

    def popf(r: Program, at: int, load: Load, store: Store) -> None:
        before, sp = r.rflags, r.gpr(RSP)
        if before & VM:
            raise NotHere
        image = load(place(r, sp, size, False), size)
        mask = plain
        if is_trusted(r):
            mask |= IF
        if r.cpl == 0:
            mask |= IOPL
        r.set_gpr(RSP, pointer(r, sp + size))
        after = r.rflags = before & ~(mask | RF) | image & mask | FIXED
        if (before ^ after) & (TF | IF | AC):
            r.look_up()

    return popf


def _access_check(instruction: iced.Instruction, stack: Stack) -> Flow:
    """CLAC and STAC: whether a supervisor may access the pages of users."""
    wanted = AC if instruction.mnemonic == Mnemonic.STAC else 0

    def change(r: Program, at: int, load: Load, store: Store) -> None:
        if r.cpl:
            raise NotHere
        r.rflags = r.rflags & ~AC | wanted
        r.look_up()

    return change


MAKERS: Final[dict[int, Callable[[iced.Instruction, Stack], Flow]]] = {
    Mnemonic.CLI: _cli, Mnemonic.STI: _sti,
    **dict.fromkeys((Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ), _pushf),
    **dict.fromkeys((Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ), _popf),
    Mnemonic.CLAC: _access_check, Mnemonic.STAC: _access_check,
}  # fmt: skip


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out an instruction of this group.  None: it is of another."""
    make = MAKERS.get(instruction.mnemonic)
    return None if make is None else make(instruction, stack_of(bits))
