"""An instruction whose store is refused has changed no register and no flag.

Source: SDM 3A, "Faults".  Invariant: the load before it was allowed.
"""

import pytest

from tests.unit.instructions.fake_guest import FakeGuest
from understudy.instructions.interpreter import decode, plan
from understudy.paging.guest_walk import GuestFault


@pytest.mark.parametrize(
    "code",
    [
        "0f b1 0b",  # cmpxchg [rbx], ecx
        "0f c1 0b",  # xadd [rbx], ecx
        "87 0b",  # xchg [rbx], ecx
        "0f c7 0b",  # cmpxchg8b [rbx]
        "11 0b",  # adc [rbx], ecx
        "ff 03",  # inc dword [rbx]
        "f7 1b",  # neg dword [rbx]
    ],
)
def test_nothing_has_changed(code: str) -> None:
    raw = bytes.fromhex(code)
    guest = FakeGuest(code=raw, rax=5, rbx=0x1000, rcx=7, rdx=9)
    guest.rflags = 0x8D7  # all six, and bit 1
    made = plan(decode(raw.ljust(15, b"\x90"), 64), 64)
    assert made is not None
    before = list(guest.gprs)

    def refuse(at: int, size: int, value: int) -> None:
        raise GuestFault(at, 2)

    with pytest.raises(GuestFault):
        made.action(guest, made.address(guest), lambda at, size: 5, refuse)
    assert (guest.gprs, guest.rflags) == (before, 0x8D7)
