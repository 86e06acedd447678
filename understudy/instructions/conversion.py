"""The accumulator and the status flags on their own: widening, copies of flags, single flags.

Source: SDM 1, "Type Conversion Instructions", "EFLAGS Cross-Reference", "Flag Control (EFLAG)
Instructions"; SDM 2, the instructions' own pages.

Invariant: nothing but what the instruction names changes; no memory is accessed.
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, Register

from understudy.instructions.access import Action, Load, Make, Store
from understudy.instructions.arithmetic import AF, CF, PF, SF, ZF
from understudy.instructions.operands import MASKS, reader, writer
from understudy.instructions.registers import Registers

DF: Final = 1 << 10
OF_AH: Final = SF | ZF | AF | PF | CF
FIXED: Final = 2  # the flag that is always set

WIDENED: Final = {
    Mnemonic.CBW: (Register.AL, Register.AX), Mnemonic.CWDE: (Register.AX, Register.EAX),
    Mnemonic.CDQE: (Register.EAX, Register.RAX),
}  # fmt: skip
SPREAD: Final = {
    Mnemonic.CWD: (Register.AX, Register.DX), Mnemonic.CDQ: (Register.EAX, Register.EDX),
    Mnemonic.CQO: (Register.RAX, Register.RDX),
}  # fmt: skip
CHANGES: Final = {  # flags that are cleared, then flags that are changed over
    Mnemonic.CLC: (CF, 0), Mnemonic.STC: (CF, CF), Mnemonic.CMC: (0, CF),
    Mnemonic.CLD: (DF, 0), Mnemonic.STD: (DF, DF),
}  # fmt: skip


def _widen(instruction: iced.Instruction) -> Action:
    narrow, wide = WIDENED[instruction.mnemonic]
    get, put, sign = reader(narrow), writer(wide), 1 << 8 * iced.RegisterExt.size(narrow) - 1
    return lambda guest, at, load, store: put(guest, (get(guest) ^ sign) - sign)


def _spread(instruction: iced.Instruction) -> Action:
    of, to = SPREAD[instruction.mnemonic]
    size = iced.RegisterExt.size(of)
    get, put, top, ones = reader(of), writer(to), 8 * size - 1, MASKS[size]
    return lambda guest, at, load, store: put(guest, ones if get(guest) >> top else 0)


def _change(instruction: iced.Instruction) -> Action:
    cleared, changed = CHANGES[instruction.mnemonic]

    def change(guest: Registers, at: int, load: Load, store: Store) -> None:
        guest.rflags = guest.rflags & ~cleared ^ changed

    return change


def _lahf(instruction: iced.Instruction) -> Action:
    put = writer(Register.AH)
    return lambda guest, at, load, store: put(guest, guest.rflags & OF_AH | FIXED)


def _sahf(instruction: iced.Instruction) -> Action:
    get = reader(Register.AH)

    def sahf(guest: Registers, at: int, load: Load, store: Store) -> None:
        guest.rflags = guest.rflags & ~OF_AH | get(guest) & OF_AH

    return sahf


def _salc(instruction: iced.Instruction) -> Action:
    put = writer(Register.AL)
    return lambda guest, at, load, store: put(guest, 0xFF if guest.rflags & CF else 0)


MAKERS: Final[dict[int, Make]] = {
    **dict.fromkeys(WIDENED, _widen), **dict.fromkeys(SPREAD, _spread),
    **dict.fromkeys(CHANGES, _change),
    Mnemonic.LAHF: _lahf, Mnemonic.SAHF: _sahf, Mnemonic.SALC: _salc,
}  # fmt: skip
