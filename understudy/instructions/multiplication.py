"""Multiplication and division, and the adjustments of decimal numbers.

Source: SDM 1, "Binary Arithmetic Instructions", "Decimal Arithmetic Instructions"; SDM 2, the
instructions' own pages.

Invariants: results and flags are those of the silicon: what the SDM leaves open is as this computer
does it (`Native`); a quotient that has no room, or a division by 0, is a GuestFault with #DE and
changes nothing.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, Register

from understudy.arch.exception import Vector
from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size
from understudy.instructions.arithmetic import (
    AF,
    CF,
    OPERATIONS,
    PARITY,
    SF,
    STATUS,
    ZF,
    computer,
)  # fmt: skip
from understudy.instructions.operands import ACCUMULATORS, MASKS, Read, reader, target, writer
from understudy.instructions.registers import Registers
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Native

DATA: Final = {2: Register.DX, 4: Register.EDX, 8: Register.RDX}
AX: Final = (reader(Register.AX), writer(Register.AX))


def _signed(value: int, bits: int) -> int:
    sign = 1 << bits - 1
    return (value ^ sign) - sign


def _divide_error() -> GuestFault:
    return GuestFault(0, 0, Vector.DE)


def _halves(size: int) -> tuple[Read, Callable[[Registers, int, int], None]]:
    """The double-width accumulator: how it is read, and how its (high, low) halves are set."""
    bits = 8 * size
    if size == 1:
        read, write = AX
        return read, lambda guest, high, low: write(guest, high << 8 | low)
    low_of, set_low = reader(ACCUMULATORS[size]), writer(ACCUMULATORS[size])
    high_of, set_high = reader(DATA[size]), writer(DATA[size])

    def put(guest: Registers, high: int, low: int) -> None:
        set_low(guest, low)
        set_high(guest, high)

    return lambda guest: high_of(guest) << bits | low_of(guest), put


def _multiply(instruction: iced.Instruction) -> Action | None:
    """MUL and IMUL of one operand."""
    if instruction.op_count > 1:
        return _multiply_into(instruction)
    size, get = operand_size(instruction, 0), getter(instruction, 0)
    bits, mask, is_signed = 8 * size, MASKS[size], instruction.mnemonic == Mnemonic.IMUL
    factor, (_, put) = reader(ACCUMULATORS[size]), _halves(size)
    native = Native("imul wide" if is_signed else "mul", size)
    if get is None:
        return None

    def multiply(guest: Registers, at: int, load: Load, store: Store) -> None:
        left, right = factor(guest), get(guest, at, load)
        product = _signed(left, bits) * _signed(right, bits) if is_signed else left * right
        put(guest, product >> bits & mask, product & mask)
        guest.rflags = guest.rflags & ~STATUS | native(left, 0, right, guest.rflags)[1]

    return multiply


def _multiply_into(instruction: iced.Instruction) -> Action | None:
    """IMUL of two or three operands."""
    first = 0 if instruction.op_count == 2 else 1
    size = operand_size(instruction, 0)
    bits, mask, native = 8 * size, MASKS[size], Native("imul", size)
    put, left_of = target(instruction, 0), getter(instruction, first)
    right_of = getter(instruction, first + 1)
    if put is None or left_of is None or right_of is None:
        return None

    def multiply(guest: Registers, at: int, load: Load, store: Store) -> None:
        left, right = left_of(guest, at, load), right_of(guest, at, load)
        product = _signed(left, bits) * _signed(right, bits)
        put(guest, product & mask)
        flags = native(left & mask, right & mask, 0, guest.rflags)[1]
        guest.rflags = guest.rflags & ~STATUS | flags

    return multiply


def _divide(instruction: iced.Instruction) -> Action | None:
    size, get = operand_size(instruction, 0), getter(instruction, 0)
    bits, mask, is_signed = 8 * size, MASKS[size], instruction.mnemonic == Mnemonic.IDIV
    dividend_of, put = _halves(size)
    native, low = Native("idiv" if is_signed else "div", size), 0xFFFF if size == 1 else mask
    if get is None:
        return None

    def divide(guest: Registers, at: int, load: Load, store: Store) -> None:
        by, both = get(guest, at, load), dividend_of(guest)
        divisor, dividend = by, both
        if is_signed:
            divisor, dividend = _signed(divisor, bits), _signed(dividend, 2 * bits)
        if not divisor:
            raise _divide_error()
        quotient = abs(dividend) // abs(divisor)
        if (dividend < 0) != (divisor < 0):
            quotient = -quotient
        if quotient != (_signed(quotient & mask, bits) if is_signed else quotient & mask):
            raise _divide_error()
        put(guest, dividend - quotient * divisor & mask, quotient & mask)
        guest.rflags = (
            guest.rflags & ~STATUS | native(both & low, both >> bits, by, guest.rflags)[1]
        )

    return divide


# --- decimal numbers ---

_ADD8, _SUB8 = (computer(OPERATIONS[name], 8) for name in (Mnemonic.ADD, Mnemonic.SUB))
_ADD16, _SUB16 = (computer(OPERATIONS[name], 16) for name in (Mnemonic.ADD, Mnemonic.SUB))


def _packed(instruction: iced.Instruction) -> Action:
    """DAA and DAS."""
    is_sum = instruction.mnemonic == Mnemonic.DAA
    compute = _ADD8 if is_sum else _SUB8

    def adjust(guest: Registers, at: int, load: Load, store: Store) -> None:
        ax, flags = AX[0](guest), guest.rflags
        al = ax & 0xFF
        is_low, is_high = al & 15 > 9 or flags & AF, al > 0x99 or flags & CF
        result, after = compute(al, (6 if is_low else 0) + (0x60 if is_high else 0), flags)
        borrows = not is_sum and is_low and al < 6  # in the low digit's correction
        after = after & ~(CF | AF) | (CF if is_high or borrows else 0) | (AF if is_low else 0)
        AX[1](guest, ax & 0xFF00 | result)
        guest.rflags = after

    return adjust


def _unpacked(instruction: iced.Instruction) -> Action:
    """AAA and AAS: OF, SF, ZF and PF are those of AX before the upper digit of AL goes."""
    compute = _ADD16 if instruction.mnemonic == Mnemonic.AAA else _SUB16

    def adjust(guest: Registers, at: int, load: Load, store: Store) -> None:
        ax, flags = AX[0](guest), guest.rflags
        is_carried = ax & 15 > 9 or flags & AF
        result, after = compute(ax, 0x106 if is_carried else 0, flags)
        AX[1](guest, result & 0xFF0F)
        guest.rflags = after & ~(AF | CF) | (AF | CF if is_carried else 0)

    return adjust


def _aam(instruction: iced.Instruction) -> Action:
    by = instruction.immediate8

    def adjust(guest: Registers, at: int, load: Load, store: Store) -> None:
        if not by:
            raise _divide_error()
        tens, ones = divmod(AX[0](guest) & 0xFF, by)
        AX[1](guest, tens << 8 | ones)
        flags = PARITY[ones] | (0 if ones else ZF) | (SF if ones & 0x80 else 0)
        guest.rflags = guest.rflags & ~STATUS | flags

    return adjust


def _aad(instruction: iced.Instruction) -> Action:
    by = instruction.immediate8

    def adjust(guest: Registers, at: int, load: Load, store: Store) -> None:
        ax = AX[0](guest)
        result, guest.rflags = _ADD8(ax & 0xFF, (ax >> 8) * by & 0xFF, guest.rflags)
        AX[1](guest, result)

    return adjust


MAKERS: Final[dict[int, Make]] = {
    Mnemonic.MUL: _multiply, Mnemonic.IMUL: _multiply, Mnemonic.DIV: _divide,
    Mnemonic.IDIV: _divide, Mnemonic.DAA: _packed, Mnemonic.DAS: _packed,
    Mnemonic.AAA: _unpacked, Mnemonic.AAS: _unpacked, Mnemonic.AAM: _aam, Mnemonic.AAD: _aad,
}  # fmt: skip
