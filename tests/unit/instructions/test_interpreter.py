"""Plans: found by what the bytes are now, and right without memory, too."""

from tests.unit.instructions.fake_guest import FakeGuest
from understudy.instructions.interpreter import plan_at


def nowhere(place: int, size: int) -> int:
    raise AssertionError("no memory is accessed")


def never(place: int, size: int, value: int) -> None:
    raise AssertionError("no memory is accessed")


def run(guest: FakeGuest, code: str) -> FakeGuest:
    guest.code = bytes.fromhex(code).ljust(15, b"\x90")
    plan = plan_at(guest)
    assert plan is not None
    plan.action(guest, 0, nowhere, never)
    return guest


def test_registers_alone() -> None:
    assert run(FakeGuest(rcx=5, rdx=7), "01 d1").gpr(1) == 12  # add ecx,edx
    assert run(FakeGuest(rcx=5, rdx=7), "87 d1").gpr(2) == 5  # xchg ecx,edx
    assert run(FakeGuest(rcx=0xFF), "48 0f be c9").gpr(1) == (1 << 64) - 1  # movsx rcx,cl
    assert run(FakeGuest(rcx=4), "0f ba e1 02").rflags & 1 == 1  # bt ecx,2
    assert run(FakeGuest(rax=1, rcx=1, rdx=9), "0f b1 d1").gpr(1) == 9  # cmpxchg ecx,edx


def test_a_plan_goes_by_the_bytes_that_are_there_now() -> None:
    guest = FakeGuest(rcx=5, rdx=7)
    run(guest, "01 d1")
    run(guest, "29 d1")  # sub ecx,edx at the same address
    assert guest.gpr(1) == 5


def test_the_same_bytes_mean_another_thing_in_other_code() -> None:
    assert run(FakeGuest(64, rcx=1 << 40), "ff c1").gpr(1) == 1
    assert run(FakeGuest(16, rcx=0x1_FFFF), "ff c1").gpr(1) == 0x1_0000  # inc cx


def test_what_has_no_plan() -> None:
    for code in ("ff 33", "0f 58 03", "0f a3 03", "8c 03", "c7", ""):
        assert plan_at(FakeGuest(code=bytes.fromhex(code))) is None, code


def test_memory_is_reached_by_the_callers_functions() -> None:
    guest = FakeGuest(rax=0x10, rbx=0x5000, code=bytes.fromhex("01 43 08"))  # add [rbx+8],eax
    plan = plan_at(guest)
    assert plan is not None
    assert plan.address(guest) == 0x5008
    stored: list[tuple[int, int, int]] = []
    plan.action(guest, 0x1234, lambda at, n: at, lambda at, n, value: stored.append((at, n, value)))
    assert stored == [(0x1234, 4, 0x1244)]
