"""An accident and a reset on purpose are told apart."""

import pytest

from understudy.answers.triple_fault import holds_no_gate, raises


@pytest.mark.parametrize("code", [b"\xcc\x90", b"\xcd\x03", b"\xf1"])
def test_an_exception_raised_with_an_empty_table_is_on_purpose(code: bytes) -> None:
    assert raises(code)
    assert holds_no_gate(0)
    assert holds_no_gate(6)


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        (0xFFF, b"\xcc"),
        (7, b"\xcc"),
        (0, b"\x8b\x00"),
        (0, b"\x0f\x0b"),
        (0, b"\x0f\x22\xc0"),
        (0, b""),
    ],
)
def test_anything_else_is_an_accident(limit: int, code: bytes) -> None:
    assert not (holds_no_gate(limit) and raises(code))
