"""Shifts and rotates.

Source: SDM 1, "Shift and Rotate Instructions"; SDM 2, the instructions' own pages.

Invariants: results and flags are those of the silicon, also where the SDM leaves flags undefined
(AF is set by shifts; OF is the one of the last step); a count of 0 changes no flag, but writes its
operand.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size, putter
from understudy.instructions.arithmetic import AF, CF, OF, PARITY, PF, SF, ZF
from understudy.instructions.registers import Registers

Step = Callable[[int, int, int], tuple[int, int]]
"""(value, count > 0, CF before) to (result, all flags that change)."""
ROTATED: Final = CF | OF
SHIFTED: Final = CF | PF | AF | ZF | SF | OF


def _of(result: int, bits: int) -> int:
    """ZF, SF and PF of a result, and AF."""
    flags = PARITY[result & 0xFF] | AF
    if not result:
        return flags | ZF
    return flags | SF if result >> bits - 1 else flags


def _over_left(result: int, carry: int, bits: int) -> int:
    """OF of what moves left: the last step changed the sign."""
    return OF if result >> bits - 1 != carry else 0


def _over_right(result: int, bits: int) -> int:
    """OF of what moves right: the two highest bits differ."""
    return OF if (result >> bits - 1 ^ result >> bits - 2) & 1 else 0


def _shl(bits: int) -> Step:
    mask = (1 << bits) - 1

    def step(value: int, count: int, before: int) -> tuple[int, int]:
        wide = value << count
        result, carry = wide & mask, wide >> bits & 1
        return result, _of(result, bits) | carry | _over_left(result, carry, bits)

    return step


def _shr(bits: int) -> Step:
    def step(value: int, count: int, before: int) -> tuple[int, int]:
        result = value >> count
        return result, _of(result, bits) | value >> count - 1 & 1 | _over_right(result, bits)

    return step


def _sar(bits: int) -> Step:
    mask, sign = (1 << bits) - 1, 1 << bits - 1

    def step(value: int, count: int, before: int) -> tuple[int, int]:
        value = (value ^ sign) - sign
        result = value >> count & mask
        return result, _of(result, bits) | value >> count - 1 & 1

    return step


def _rol(bits: int) -> Step:
    mask = (1 << bits) - 1

    def step(value: int, count: int, before: int) -> tuple[int, int]:
        result = (value << count % bits | value >> bits - count % bits) & mask
        carry = result & 1
        return result, carry | _over_left(result, carry, bits)

    return step


def _ror(bits: int) -> Step:
    mask = (1 << bits) - 1

    def step(value: int, count: int, before: int) -> tuple[int, int]:
        result = (value >> count % bits | value << bits - count % bits) & mask
        return result, result >> bits - 1 | _over_right(result, bits)

    return step


def _through_carry(value: int, carry: int, count: int, bits: int) -> tuple[int, int]:
    """Rotate carry:value, which has one bit more, left."""
    ring = carry << bits | value
    ring = ring << count | ring >> bits + 1 - count
    return ring & (1 << bits) - 1, ring >> bits & 1


def _rcl(bits: int) -> Step:
    def step(value: int, count: int, before: int) -> tuple[int, int]:
        result, carry = _through_carry(value, before, count % (bits + 1), bits)
        return result, carry | _over_left(result, carry, bits)

    return step


def _rcr(bits: int) -> Step:
    def step(value: int, count: int, before: int) -> tuple[int, int]:
        result, carry = _through_carry(value, before, -count % (bits + 1), bits)
        return result, carry | _over_right(result, bits)

    return step


SHIFTS: Final[dict[int, tuple[Callable[[int], Step], int]]] = {
    Mnemonic.SHL: (_shl, SHIFTED), Mnemonic.SAL: (_shl, SHIFTED), Mnemonic.SHR: (_shr, SHIFTED),
    Mnemonic.SAR: (_sar, SHIFTED), Mnemonic.ROL: (_rol, ROTATED), Mnemonic.ROR: (_ror, ROTATED),
    Mnemonic.RCL: (_rcl, ROTATED), Mnemonic.RCR: (_rcr, ROTATED),
}  # fmt: skip


def _shift(instruction: iced.Instruction) -> Action | None:
    make, changed = SHIFTS[instruction.mnemonic]
    size = operand_size(instruction, 0)
    step, most, kept = make(8 * size), 63 if size == 8 else 31, ~changed
    get, put, count_of = getter(instruction, 0), putter(instruction, 0), getter(instruction, 1)
    if get is None or put is None or count_of is None:
        return None

    def shift(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, count = get(guest, at, load), count_of(guest, at, load) & most
        if not count:
            put(guest, at, store, value)
            return
        flags = guest.rflags
        value, changes = step(value, count, flags & CF)
        put(guest, at, store, value)
        guest.rflags = flags & kept | changes

    return shift


# --- SHLD and SHRD ---


def _shld(value: int, filler: int, count: int, bits: int) -> tuple[int, int]:
    """`value:filler` moved left.  Counts above the width (of words) bring `filler` again."""
    wide = value << 2 * bits | filler << bits | filler
    result = wide << count >> 2 * bits & (1 << bits) - 1
    carry = 0 if count > bits else value >> bits - count & 1
    # From the full width on, nothing of the old sign is left to compare the carry with.
    over = _over_left(result, carry, bits) if count < bits else OF * carry
    return result, _of(result, bits) | carry | over


def _shrd(value: int, filler: int, count: int, bits: int) -> tuple[int, int]:
    """`filler:value` moved right."""
    wide = filler << 2 * bits | filler << bits | value
    result = wide >> count & (1 << bits) - 1
    carry = 0 if count > bits else value >> count - 1 & 1
    return result, _of(result, bits) | carry | _over_right(result, bits)


def _double(instruction: iced.Instruction) -> Action | None:
    step = _shld if instruction.mnemonic == Mnemonic.SHLD else _shrd
    size = operand_size(instruction, 0)
    bits, most = 8 * size, 63 if size == 8 else 31
    get, put = getter(instruction, 0), putter(instruction, 0)
    filler_of, count_of = getter(instruction, 1), getter(instruction, 2)
    if get is None or put is None or filler_of is None or count_of is None:
        return None

    def shift(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, count = get(guest, at, load), count_of(guest, at, load) & most
        if not count:
            put(guest, at, store, value)
            return
        value, changes = step(value, filler_of(guest, at, load), count, bits)
        put(guest, at, store, value)
        guest.rflags = guest.rflags & ~SHIFTED | changes

    return shift


MAKERS: Final[dict[int, Make]] = {
    **dict.fromkeys(SHIFTS, _shift), Mnemonic.SHLD: _double, Mnemonic.SHRD: _double,
}  # fmt: skip
