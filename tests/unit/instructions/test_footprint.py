"""What instructions touch, where that is not simply their operand."""

import pytest

from tests.unit.instructions.fake_guest import FakeGuest
from understudy.instructions.footprint import (
    NotDecoded,
    Touch,
    faults_first,
    footprint,
)


def touches(guest: FakeGuest, code: str, image: bytes = bytes(512)) -> list[Touch]:
    guest.code = bytes.fromhex(code)
    return footprint(guest, lambda: image)


@pytest.mark.parametrize(
    ("code", "bit", "at"),
    [
        ("0f a3 0b", 0, 0x5000),  # bt [rbx],ecx
        ("0f a3 0b", 33, 0x5004),
        ("0f a3 0b", 0xFFFF_FFFF, 0x4FFC),  # the bit before
        ("48 0f a3 0b", 64, 0x5008),
        ("66 0f a3 0b", 16, 0x5002),
        ("66 0f a3 0b", 0x8000, 0x4000),
    ],
)
def test_a_bit_may_be_far_from_its_operand(code: str, bit: int, at: int) -> None:
    found = touches(FakeGuest(rbx=0x5000, rcx=bit), code)
    assert [(touch.gva, touch.writes) for touch in found] == [(at, False)]


def test_a_push_touches_the_stack_too() -> None:
    found = touches(FakeGuest(rbx=0x5000, rsp=0x8000), "ff 33")
    assert found == [Touch(0x5000, 8, True, False), Touch(0x7FF8, 8, False, True)]


def test_a_pop_to_an_address_by_rsp_counts_from_after_it() -> None:
    found = touches(FakeGuest(rsp=0x8000), "8f 44 24 10")  # pop [rsp+10h]
    assert found[0].gva == 0x8018


def test_a_masked_move_writes_what_the_mask_names() -> None:
    image = bytearray(512)
    image[160 + 16 + 3] = 0x80  # XMM1, byte 3
    found = touches(FakeGuest(rdi=0x5000), "66 0f f7 c1", bytes(image))  # maskmovdqu xmm0,xmm1
    assert [touch for touch in found if touch.writes] == [Touch(0x5003, 1, False, True)]


def test_a_prefetch_and_a_flush_touch_nothing() -> None:
    for code in ("0f 18 03", "0f ae 3b"):
        assert touches(FakeGuest(rbx=0x5000), code) == []


@pytest.mark.parametrize(
    ("code", "components", "written", "read"),
    [
        # xsave, of 64-bit code: FCW to FDP, MXCSR, the x87 registers, those of SSE, the header
        ("0f ae 27", 3, [(0, 24), (24, 8), (32, 128), (160, 256), (512, 16)], [(512, 16)]),
        ("0f ae 27", 0x200, [(512, 16), (2688, 8)], [(512, 16)]),
        ("0f c7 27", 0x200, [(512, 16), (576, 8)], [(512, 16), (576, 8)]),  # xsavec
        ("0f ae 2f", 1, [], [(0, 24), (32, 128), (512, 64)]),  # xrstor
        ("0f ae 27", 1 << 40, [(512, 16)], [(512, 16)]),  # what XCR0 does not name
    ],
)
def test_an_area_is_touched_where_its_components_are(
    code: str, components: int, written: list[tuple[int, int]], read: list[tuple[int, int]]
) -> None:
    guest = FakeGuest(rdi=0x5000, rax=components & 0xFFFF_FFFF, rdx=components >> 32)
    guest.xcr0 = 0x203
    found = sorted(touches(guest, code))
    assert [(t.gva - 0x5000, t.size) for t in found if t.writes] == written
    assert [(t.gva - 0x5000, t.size) for t in found if t.reads] == read


def test_what_is_no_instruction_is_said_with_its_bytes() -> None:
    with pytest.raises(NotDecoded, match="06 06"):
        touches(FakeGuest(), "06 06")


@pytest.mark.parametrize(
    ("code", "rbx", "cr0", "is_sure"),
    [
        ("0f 28 03", 0x5000, 0, False),  # movaps xmm0,[rbx]
        ("0f 28 03", 0x5008, 0, True),  # not aligned
        ("0f 10 03", 0x5008, 0, False),  # movups
        ("0f 28 03", 0x5000, 8, True),  # CR0.TS
        ("d9 03", 0x5000, 8, True),  # fld dword
        ("0f ae 03", 0x5000, 8, True),  # fxsave
        ("0f c3 03", 0x5000, 8, False),  # movnti
        ("f2 0f 38 f1 03", 0x5001, 8, False),  # crc32
        ("48 f7 23", 0x5001, 8, False),  # mul
        ("0f ae 23", 0x5000, 8, True),  # xsave
        ("0f ae 23", 0x5000, 4, False),  # to which CR0.EM is nothing
        ("0f ae 23", 0x5020, 0, True),
    ],
)
def test_what_faults_before_it_reads(code: str, rbx: int, cr0: int, is_sure: bool) -> None:
    guest = FakeGuest(rbx=rbx, code=bytes.fromhex(code))
    guest.cr0 = cr0
    assert faults_first(guest) is is_sure
