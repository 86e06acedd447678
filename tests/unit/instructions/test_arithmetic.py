"""Flags against definitions by signed and unsigned numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Mnemonic

from understudy.instructions.arithmetic import AF, CF, OF, OPERATIONS, PF, SF, ZF, flags_of

SIZES = st.sampled_from([8, 16, 32, 64])


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


@pytest.mark.parametrize("name", ["ADD", "ADC", "SUB", "SBB", "CMP", "AND", "OR", "XOR", "TEST"])
@given(st.data(), SIZES, st.booleans())
def test_flags_by_definition(name: str, data: st.DataObject, bits: int, carry: bool) -> None:
    number = st.integers(0, (1 << bits) - 1) | st.sampled_from([0, 1, (1 << bits - 1) - 1])
    left, right = data.draw(number), data.draw(number)
    result, flags = flags_of(OPERATIONS[getattr(Mnemonic, name)], left, right, bits, int(carry))
    extra = int(carry) if name in ("ADC", "SBB") else 0
    if name in ("ADD", "ADC"):
        exact, low = left + right + extra, (left & 15) + (right & 15) + extra
        true = signed(left, bits) + signed(right, bits) + extra
    elif name in ("SUB", "SBB", "CMP"):
        exact, low = left - right - extra, (left & 15) - (right & 15) - extra
        true = signed(left, bits) - signed(right, bits) - extra
    else:
        exact = {"AND": left & right, "TEST": left & right, "OR": left | right}.get(
            name, left ^ right
        )
        low, true = 0, signed(exact, bits)
    value = exact & (1 << bits) - 1
    assert result == (None if name in ("CMP", "TEST") else value)
    assert bool(flags & CF) == (not 0 <= exact < 1 << bits)
    assert bool(flags & ZF) == (value == 0)
    assert bool(flags & SF) == (value >> bits - 1 == 1)
    assert bool(flags & PF) == (bin(value & 0xFF).count("1") % 2 == 0)
    assert bool(flags & OF) == (true != signed(value, bits))
    assert bool(flags & AF) == (not 0 <= low < 16)
