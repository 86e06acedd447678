"""Arithmetic with the status flags of the SDM, for instructions carried out by the hypervisor.

Source: SDM 1, "Status Flags", and the instructions' own pages in SDM 2.

Invariant: results and flags are those of the silicon, which clears AF where the SDM leaves it
undefined (logic).
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size, putter
from understudy.instructions.operands import source, target
from understudy.instructions.registers import Registers

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
STATUS: Final = CF | PF | AF | ZF | SF | OF

Compute = Callable[[int, int, int], tuple[int, int]]
"""(left, right, RFLAGS) to (the result, the new RFLAGS)."""

PARITY: Final = tuple(0 if byte.bit_count() % 2 else PF for byte in range(256))


class Operation(NamedTuple):
    """compute(left, right, carry) without a bound; kind: how CF, AF and OF come about."""

    compute: Callable[[int, int, int], int]
    kind: str  # "logic", "add", "sub", "step up", "step down", "not", "neg"
    keeps_result: bool = True


OPERATIONS: Final[dict[int, Operation]] = {
    Mnemonic.AND: Operation(lambda a, b, c: a & b, "logic"),
    Mnemonic.OR: Operation(lambda a, b, c: a | b, "logic"),
    Mnemonic.XOR: Operation(lambda a, b, c: a ^ b, "logic"),
    Mnemonic.TEST: Operation(lambda a, b, c: a & b, "logic", keeps_result=False),
    Mnemonic.ADD: Operation(lambda a, b, c: a + b, "add"),
    Mnemonic.ADC: Operation(lambda a, b, c: a + b + c, "add"),
    Mnemonic.SUB: Operation(lambda a, b, c: a - b, "sub"),
    Mnemonic.SBB: Operation(lambda a, b, c: a - b - c, "sub"),
    Mnemonic.CMP: Operation(lambda a, b, c: a - b, "sub", keeps_result=False),
    Mnemonic.INC: Operation(lambda a, b, c: a + 1, "step up"),
    Mnemonic.DEC: Operation(lambda a, b, c: a - 1, "step down"),
    Mnemonic.NOT: Operation(lambda a, b, c: ~a, "not"),
    Mnemonic.NEG: Operation(lambda a, b, c: -a, "neg"),
}


def computer(operation: Operation, bits: int) -> Compute:
    """An operation on numbers of so many bits."""
    compute, kind, _ = operation
    mask, sign = (1 << bits) - 1, 1 << bits - 1
    if kind == "not":
        return lambda left, right, flags: (~left & mask, flags)
    if kind == "logic":

        def logic(left: int, right: int, flags: int) -> tuple[int, int]:
            result = compute(left, right, 0)
            flags = flags & ~STATUS | PARITY[result & 0xFF]
            if not result:
                flags |= ZF
            elif result & sign:
                flags |= SF
            return result, flags

        return logic
    is_step, is_sum = kind.startswith("step"), kind in ("add", "step up")
    cleared = ~(PF | AF | ZF | SF | OF | (0 if is_step else CF))

    def arithmetic(left: int, right: int, flags: int) -> tuple[int, int]:
        wide = compute(left, right, flags & CF)
        result = wide & mask
        flags = flags & cleared | PARITY[result & 0xFF]
        if is_step:
            right = 1
        elif wide & ~mask:
            flags |= CF
        if kind == "neg":
            left, right = 0, left
        if not result:
            flags |= ZF
        elif result & sign:
            flags |= SF
        if (left ^ right ^ result) & 0x10:
            flags |= AF
        if (left ^ result) & ((right ^ result) if is_sum else (left ^ right)) & sign:
            flags |= OF
        return result, flags

    return arithmetic


def flags_of(
    operation: Operation, left: int, right: int, bits: int, flags: int
) -> tuple[int | None, int]:
    """(the result to keep, or None; the new RFLAGS)."""
    result, flags = computer(operation, bits)(left, right, flags)
    return (result if operation.keeps_result else None), flags


def _compute(instruction: iced.Instruction) -> Action | None:
    operation = OPERATIONS[instruction.mnemonic]
    compute = computer(operation, 8 * operand_size(instruction, 0))
    if OpKind.MEMORY not in (instruction.op0_kind, instruction.op1_kind):
        return _compute_registers(instruction, operation, compute)
    get, put = getter(instruction, 0), putter(instruction, 0)
    other = getter(instruction, 1) if instruction.op_count > 1 else _one
    if get is None or put is None or other is None:
        return None
    if not operation.keeps_result:

        def test(guest: Registers, at: int, load: Load, store: Store) -> None:
            left, right = get(guest, at, load), other(guest, at, load)
            guest.rflags = compute(left, right, guest.rflags)[1]

        return test

    def change(guest: Registers, at: int, load: Load, store: Store) -> None:
        left, right = get(guest, at, load), other(guest, at, load)
        result, flags = compute(left, right, guest.rflags)
        put(guest, at, store, result)
        guest.rflags = flags

    return change


def _compute_registers(
    instruction: iced.Instruction, operation: Operation, compute: Compute
) -> Action | None:
    """The same without memory, the most frequent: without detours."""
    size = operand_size(instruction, 0)
    left, write = source(instruction, 0, size), target(instruction, 0)
    right = source(instruction, 1, size) if instruction.op_count > 1 else lambda guest: 1
    if left is None or right is None:
        return None
    if not operation.keeps_result:

        def test(guest: Registers, at: int, load: Load, store: Store) -> None:
            guest.rflags = compute(left(guest), right(guest), guest.rflags)[1]

        return test
    if write is None:
        return None

    def change(guest: Registers, at: int, load: Load, store: Store) -> None:
        result, guest.rflags = compute(left(guest), right(guest), guest.rflags)
        write(guest, result)

    return change


def _one(guest: Registers, at: int, load: Load) -> int:
    return 1


MAKERS: Final[dict[int, Make]] = dict.fromkeys(OPERATIONS, _compute)
