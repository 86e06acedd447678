"""Addresses and registers against what the decoder says an instruction uses."""

import random

import iced_x86 as iced
import pytest
from iced_x86 import OpKind, Register

from tests.unit.instructions.fake_guest import FakeGuest
from understudy.instructions.footprint import footprint
from understudy.instructions.operands import (
    advance,
    operand_address,
    pieces,
    reader,
    writer,
)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_form_of_address(bits: int) -> None:
    rng = random.Random(bits)
    for _ in range(3000):
        guest = FakeGuest(bits)
        guest.gprs = [rng.getrandbits(64) for _ in range(16)]
        guest.bases = [rng.getrandbits(32) for _ in range(6)]
        guest.rip = rng.getrandbits(48 if bits == 64 else 16)
        prefix = rng.choice([b"", b"\x67", b"\x64", b"\x65\x67", b"\x2e", b"\x36"])
        rex = bytes([0x40 | rng.randrange(16)]) if bits == 64 else b""
        guest.code = code = prefix + rex + b"\x8b" + rng.randbytes(12)
        instruction = iced.Decoder(bits, code).decode()
        if instruction.mnemonic == iced.Mnemonic.INVALID or instruction.op1_kind != OpKind.MEMORY:
            continue
        expected = footprint(guest, lambda: b"")[0].gva
        assert operand_address(instruction, bits)(guest) == expected, code.hex(" ")


@pytest.mark.parametrize(
    ("register", "value", "after"),
    [
        (Register.AL, 0xFF, 0x1122_3344_5566_77FF),
        (Register.AH, 0xFF, 0x1122_3344_5566_FF88),
        (Register.AX, 0xFFFF, 0x1122_3344_5566_FFFF),
        (Register.EAX, 0x1_FFFF_FFFF, 0xFFFF_FFFF),
        (Register.RAX, 5, 5),
    ],
)
def test_a_write_is_as_wide_as_the_register(register: int, value: int, after: int) -> None:
    guest = FakeGuest(rax=0x1122_3344_5566_7788)
    writer(register)(guest, value)  # type: ignore[arg-type]
    assert guest.gpr(0) == after
    assert reader(register)(guest) == value & 0xFFFF_FFFF  # type: ignore[arg-type]


def test_a_step_of_sixteen_bits_keeps_the_rest() -> None:
    guest = FakeGuest(rcx=0x1_0000_0000)
    advance(guest, 1, -1, 0xFFFF)
    assert guest.gpr(1) == 0x1_0000_FFFF


def test_pieces_end_with_their_pages() -> None:
    assert pieces(0x1FFE, 4) == [(0x1FFE, 2), (0x2000, 2)]
    assert pieces(0x1000, 8) == [(0x1000, 8)]
    assert pieces(0xFFF, 0x1002) == [(0xFFF, 1), (0x1000, 0x1000), (0x2000, 1)]
