"""Bits: layouts like the manual's tables."""

import pytest

from understudy.arch.bits import Bit, Bits, Field


class PTE32(Bits, width=32):
    """Page-table entry mapping a 4-KByte page, 32-bit paging."""

    ADDR = Field(31, 12)
    G = Bit(8)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


def test_fields_make_the_value_and_read_back() -> None:
    pte = PTE32(ADDR=0x1234, P=1, RW=1, US=1)
    assert pte == 0x1234007
    assert (pte.ADDR, pte.P, pte.G) == (0x1234, True, False)
    assert PTE32.ADDR.mask == 0xFFFFF000
    assert pte.replace(RW=0, ADDR=1) == 0x1005
    assert PTE32(0x80, P=1) == 0x81


def test_repr_is_the_manuals_words() -> None:
    assert repr(PTE32(ADDR=0x1234, P=1, RW=1, US=1)) == "PTE32(ADDR=0x1234 US RW P)"
    assert str(PTE32(0)) == "PTE32(0)"
    assert repr(PTE32(0x81)) == "PTE32(P reserved=0x80)"


def test_layout_for_the_agreement_with_the_other_half() -> None:
    assert PTE32.layout()[0] == ("ADDR", 31, 12)
    assert PTE32.layout()[-1] == ("P", 0, 0)


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_value_must_fit_the_width(value: int) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        PTE32(value)


def test_wrong_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"ADDR=0x100000: the field has 20 bit"):
        PTE32(ADDR=1 << 20)
    with pytest.raises(TypeError, match=r"no field NX; it has ADDR G US RW P"):
        PTE32(NX=1)


@pytest.mark.parametrize(
    "fields", [{"A": Bit(0), "B": Bit(1)}, {"A": Field(3, 1), "B": Field(1, 0)}, {"A": Bit(8)}]
)
def test_disorder_overlap_and_excess_are_type_errors(fields: dict[str, Field]) -> None:
    with pytest.raises(TypeError, match="most significant bit down"):
        type("Wrong", (Bits,), dict(fields), width=8)
