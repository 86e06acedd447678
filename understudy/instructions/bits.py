"""Bits and bytes inside an operand: tests, scans, counts, the order of bytes, and BMI's fields.

Source: SDM 1, "Bit and Byte Instructions", "Bit Manipulation Instructions"; SDM 2, the
instructions' own pages.

Invariants: results and flags are those of the silicon: what the SDM leaves open is as this computer
does it (`Native`), flags of scans and counts, and the destination after a scan of 0.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size, putter
from understudy.instructions.arithmetic import CF, STATUS, ZF
from understudy.instructions.operands import IMMEDIATES, reader, target, writer
from understudy.instructions.registers import Registers
from understudy.silicon import Native

# --- bit tests ---

TESTS: Final[dict[int, Callable[[int, int], int] | None]] = {
    Mnemonic.BT: None,
    Mnemonic.BTS: lambda old, bit: old | bit,
    Mnemonic.BTR: lambda old, bit: old & ~bit,
    Mnemonic.BTC: lambda old, bit: old ^ bit,
}


def is_bit_string(instruction: iced.Instruction) -> bool:
    """A bit test in memory whose offset is in a register: it may reach beyond the operand."""
    return (
        instruction.mnemonic in TESTS
        and instruction.op0_kind == OpKind.MEMORY
        and instruction.op1_kind not in IMMEDIATES
    )


def words_away(instruction: iced.Instruction) -> Callable[[Registers], int]:
    """Bytes from the operand of a bit string to the word that has the bit (may be negative)."""
    size = operand_size(instruction, 0)
    read = getter(instruction, 1)
    assert read is not None
    sign, bits = 1 << 8 * size - 1, 8 * size
    return lambda guest: ((read(guest, 0, _nothing) ^ sign) - sign) // bits * size


def _nothing(at: int, size: int) -> int:
    return 0


def test_bit(instruction: iced.Instruction) -> Action | None:
    """BT, BTS, BTR, BTC of the word that has the bit."""
    get, put, other = getter(instruction, 0), putter(instruction, 0), getter(instruction, 1)
    change, bits = TESTS[instruction.mnemonic], 8 * operand_size(instruction, 0)
    if get is None or put is None or other is None:
        return None

    def test(guest: Registers, at: int, load: Load, store: Store) -> None:
        old, bit = get(guest, at, load), 1 << other(guest, at, load) % bits
        if change is not None:
            put(guest, at, store, change(old, bit))
        flags = guest.rflags
        guest.rflags = flags | CF if old & bit else flags & ~CF

    return test


def _test(instruction: iced.Instruction) -> Action | None:
    return None if is_bit_string(instruction) else test_bit(instruction)


# --- scans and counts ---


def _bsf(value: int, bits: int) -> int:
    return (value & -value).bit_length() - 1


def _bsr(value: int, bits: int) -> int:
    return value.bit_length() - 1


def _scan(instruction: iced.Instruction) -> Action | None:
    is_forward, size = instruction.mnemonic == Mnemonic.BSF, operand_size(instruction, 0)
    find, native = _bsf if is_forward else _bsr, Native("bsf" if is_forward else "bsr", size)
    get, put = getter(instruction, 1), target(instruction, 0)
    whole = iced.RegisterExt.full_register(instruction.op0_register)
    old, put_whole = reader(whole), writer(whole)
    if get is None or put is None:
        return None

    def scan(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, before = get(guest, at, load), guest.rflags
        left, flags = native(old(guest), value, 0, before)
        if value:
            put(guest, find(value, 8 * size))
        else:
            put_whole(guest, left)
        guest.rflags = before & ~STATUS | flags

    return scan


COUNTS: Final[dict[int, Callable[[int, int], int]]] = {
    Mnemonic.POPCNT: lambda value, bits: value.bit_count(),
    Mnemonic.TZCNT: lambda value, bits: _bsf(value, bits) if value else bits,
    Mnemonic.LZCNT: lambda value, bits: bits - value.bit_length(),
}


NAMES: Final = {Mnemonic.TZCNT: "tzcnt", Mnemonic.LZCNT: "lzcnt"}


def _count(instruction: iced.Instruction) -> Action | None:
    count, size = COUNTS[instruction.mnemonic], operand_size(instruction, 0)
    get, put, bits = getter(instruction, 1), target(instruction, 0), 8 * size
    is_population = instruction.mnemonic == Mnemonic.POPCNT
    native = None if is_population else Native(NAMES[instruction.mnemonic], size)
    if get is None or put is None:
        return None

    def counted(guest: Registers, at: int, load: Load, store: Store) -> None:
        value, before = get(guest, at, load), guest.rflags
        put(guest, count(value, bits))
        flags = (0 if value else ZF) if native is None else native(0, value, 0, before)[1]
        guest.rflags = before & ~STATUS | flags

    return counted


# --- the order of bytes ---


def _bswap(instruction: iced.Instruction) -> Action | None:
    size = operand_size(instruction, 0)
    get, put = getter(instruction, 0), target(instruction, 0)
    if get is None or put is None:
        return None

    def swap(guest: Registers, at: int, load: Load, store: Store) -> None:
        value = get(guest, at, load)
        # Of 16 bits it is undefined; the processors of today leave zero.
        put(guest, _swapped(value, size) if size > 2 else 0)

    return swap


def _movbe(instruction: iced.Instruction) -> Action | None:
    size = operand_size(instruction, 0)
    get, put = getter(instruction, 1), putter(instruction, 0)
    if get is None or put is None:
        return None
    return lambda guest, at, load, store: put(
        guest, at, store, _swapped(get(guest, at, load), size)
    )


def _swapped(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "big")


MAKERS: Final[dict[int, Make]] = {
    **dict.fromkeys(TESTS, _test), **dict.fromkeys(COUNTS, _count),
    Mnemonic.BSF: _scan, Mnemonic.BSR: _scan, Mnemonic.BSWAP: _bswap, Mnemonic.MOVBE: _movbe,
}  # fmt: skip
