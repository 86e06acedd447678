"""Shifts and rotates.

Source: SDM 1, "Shift and Rotate Instructions"; SDM 2, the instructions' own pages.

Invariants: results and flags are those of the silicon: what the SDM leaves open (AF, OF but for one
step, a word that is shifted by more than its width) is as this computer does it (`Native`); a count
of 0 changes no flag, but writes its operand.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size, putter
from understudy.instructions.arithmetic import CF, STATUS
from understudy.instructions.registers import Registers
from understudy.silicon import Native

Step = Callable[[int, int, int, int], int]
"""(value, count > 0, CF before, width in bits) to the result, which may have more bits."""


def _shl(value: int, count: int, carry: int, bits: int) -> int:
    return value << count


def _shr(value: int, count: int, carry: int, bits: int) -> int:
    return value >> count


def _sar(value: int, count: int, carry: int, bits: int) -> int:
    sign = 1 << bits - 1
    return (value ^ sign) - sign >> count


def _rol(value: int, count: int, carry: int, bits: int) -> int:
    return value << count % bits | value >> bits - count % bits


def _ror(value: int, count: int, carry: int, bits: int) -> int:
    return value >> count % bits | value << bits - count % bits


def _rcl(value: int, count: int, carry: int, bits: int) -> int:
    """Carry:value, which has one bit more, goes round."""
    ring, count = carry << bits | value, count % (bits + 1)
    return ring << count | ring >> bits + 1 - count


def _rcr(value: int, count: int, carry: int, bits: int) -> int:
    return _rcl(value, -count, carry, bits)


SHIFTS: Final[dict[int, tuple[str, Step]]] = {
    Mnemonic.SHL: ("shl", _shl), Mnemonic.SAL: ("shl", _shl), Mnemonic.SHR: ("shr", _shr),
    Mnemonic.SAR: ("sar", _sar), Mnemonic.ROL: ("rol", _rol), Mnemonic.ROR: ("ror", _ror),
    Mnemonic.RCL: ("rcl", _rcl), Mnemonic.RCR: ("rcr", _rcr),
}  # fmt: skip


def _native(instruction: iced.Instruction, name: str) -> Native:
    """A register is rotated by a number in a way of its own."""
    is_number = instruction.op1_kind == OpKind.IMMEDIATE8
    is_own = is_number and instruction.op0_kind == OpKind.REGISTER and name in ("rol", "ror")
    return Native(f"{name} by" if is_own else name, operand_size(instruction, 0))


def _shift(instruction: iced.Instruction) -> Action | None:
    name, step = SHIFTS[instruction.mnemonic]
    native, size = _native(instruction, name), operand_size(instruction, 0)
    bits, mask, most = 8 * size, (1 << 8 * size) - 1, 63 if size == 8 else 31
    get, put, count_of = getter(instruction, 0), putter(instruction, 0), getter(instruction, 1)
    if get is None or put is None or count_of is None:
        return None

    def shift(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, count = get(guest, at, load), count_of(guest, at, load) & most
        if not count:
            put(guest, at, store, value)
            return
        before = guest.rflags
        put(guest, at, store, step(value, count, before & CF, bits) & mask)
        guest.rflags = before & ~STATUS | native(value, 0, count, before)[1]

    return shift


# --- SHLD and SHRD ---


def _double(instruction: iced.Instruction) -> Action | None:
    is_left, size = instruction.mnemonic == Mnemonic.SHLD, operand_size(instruction, 0)
    native = Native("shld" if is_left else "shrd", size)
    bits, mask, most = 8 * size, (1 << 8 * size) - 1, 63 if size == 8 else 31
    get, put = getter(instruction, 0), putter(instruction, 0)
    filler_of, count_of = getter(instruction, 1), getter(instruction, 2)
    if get is None or put is None or filler_of is None or count_of is None:
        return None

    def shift(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, count = get(guest, at, load), count_of(guest, at, load) & most
        if not count:
            put(guest, at, store, value)
            return
        before, filler = guest.rflags, filler_of(guest, at, load)
        result, flags = native(value, filler, count, before)
        if count <= bits:
            both = value << bits | filler if is_left else filler << bits | value
            result = both << count >> bits if is_left else both >> count
        put(guest, at, store, result & mask)
        guest.rflags = before & ~STATUS | flags

    return shift


MAKERS: Final[dict[int, Make]] = {
    **dict.fromkeys(SHIFTS, _shift), Mnemonic.SHLD: _double, Mnemonic.SHRD: _double,
}  # fmt: skip
