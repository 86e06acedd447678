"""Arithmetic with the status flags of the SDM, for instructions carried out by the hypervisor.

Source: SDM 1, "Status Flags", and the instructions' own pages in SDM 2.

Invariant: results and flags are those of the silicon; flags that the SDM leaves undefined keep
their old value.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from iced_x86 import Mnemonic

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11


class Operation(NamedTuple):
    """compute(left, right, carry) without a bound; kind: how CF, AF and OF come about."""

    compute: Callable[[int, int, int], int]
    kind: str  # "logic", "add", "sub", "bit", "step up", "step down", "not", "neg"
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


def flags_of(
    operation: object, left: int, right: int, bits: int, flags: int
) -> tuple[int | None, int]:
    """(the result to keep, or None; the new RFLAGS)."""
    if not isinstance(operation, Operation):
        raise TypeError(f"expected an Operation, got {operation!r}")
    mask, sign = (1 << bits) - 1, 1 << bits - 1
    kind = operation.kind
    wide = operation.compute(left, right, flags & CF)
    result = wide & mask
    if kind == "not":
        return result, flags
    kept = flags & ~(PF | ZF | SF | OF)
    kept |= PF if (result & 0xFF).bit_count() % 2 == 0 else 0
    kept |= ZF if result == 0 else 0
    kept |= SF if result & sign else 0
    if kind == "logic":
        kept &= ~CF
    else:
        if kind in ("step up", "step down"):
            right = 1
        if kind == "neg":
            left, right = 0, left
        if kind in ("add", "step up"):
            overflow = (left ^ result) & (right ^ result)
        else:
            overflow = (left ^ right) & (left ^ result)
        kept |= OF if overflow & sign else 0
        kept = kept & ~AF | (AF if (left ^ right ^ result) & 0x10 else 0)
        if kind in ("add", "sub", "neg"):
            kept = kept & ~CF | (CF if wide & ~mask else 0)
    return (result if operation.keeps_result else None), kept
