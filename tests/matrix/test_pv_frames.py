"""What a paravirtual guest's page tables name stays where it is, and there is nothing beyond them.

What: frames that move, devices that write, addresses beyond the roots, bounds of what is walked.
Source: none.  Invariant: as in test_pv_hostile.
"""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.matrix.pv_guest import PRESENT, PvGuest, audit
from understudy.arch.address import PAGE
from understudy.execution.pv import domain
from understudy.execution.pv.interface import Call, Change, Error
from understudy.paging import pv as paging_pv
from understudy.paging.guest_walk import GuestFault
from understudy.paging.pv import ENTRIES
from understudy.verdict import StopKind

DATA = 0x20_0000  # gpa of pages for anything


@pytest.fixture(params=(64, 32))
def guest(request: pytest.FixtureRequest) -> Iterator[PvGuest]:
    made = PvGuest(request.param)
    with closing(made.vm):
        made.start()
        yield made


def test_a_device_that_writes_to_a_page_table_ends_the_run(guest: PvGuest) -> None:
    guest.vm.memory.write(guest.direct + 8 * (DATA // PAGE), bytes(8))
    stop = guest.vm.go(budget=1000)
    assert stop.kind is StopKind.ERROR
    assert "a device has written to a page table" in stop.detail


@pytest.mark.parametrize("how", ["protected", "moved"])
def test_a_frame_that_moves_under_its_tables_ends_the_run(guest: PvGuest, how: str) -> None:
    p2m, gfn, pfn = guest.vm.memory.p2m, DATA // PAGE, guest.hpa(DATA) // PAGE
    if how == "protected":
        p2m.protect(gfn)
    else:
        p2m.move(gfn, guest.hpa(DATA + PAGE) // PAGE)
    stop = guest.vm.go(budget=1000)
    assert stop.kind is StopKind.ERROR
    assert "have moved under its page tables" in stop.detail
    p2m.move(gfn, pfn)


@pytest.mark.parametrize("how", ["protected", "moved"])
def test_also_if_another_has_just_moved(guest: PvGuest, how: str) -> None:
    """A frame that nobody names may; what is known of the others was before it did."""
    p2m, gfn, nobody = guest.vm.memory.p2m, DATA // PAGE, DATA // PAGE + 2
    places = [guest.hpa(n * PAGE) // PAGE for n in (gfn, nobody)]
    assert guest.map(nobody * PAGE, 0) == 1
    p2m.move(nobody, guest.hpa(DATA + PAGE) // PAGE)
    if how == "protected":
        p2m.protect(gfn)
    else:
        p2m.move(gfn, guest.hpa(DATA + PAGE) // PAGE)
    stop = guest.vm.go(budget=1000)
    assert stop.kind is StopKind.ERROR
    assert "have moved under its page tables" in stop.detail
    for n, place in zip((gfn, nobody), places, strict=True):
        p2m.move(n, place)


def test_nothing_lies_beyond_what_addresses_there_are(guest: PvGuest) -> None:
    """A root of the 32-bit format has four entries; what is behind them in its page is data."""
    memory, view = guest.vm.host.memory, guest.guest.view
    for n in range(4, ENTRIES):
        if guest.paging.levels == 3:
            memory.write_u64(view.root + 8 * n, view.root | PRESENT)
    wrong = [1 << 32, (1 << 32) + PAGE, -PAGE] if guest.paging.levels == 3 else [1 << 47, -1 << 47]
    for gva in (*wrong, 1 << 63, 1 << 64):
        for write in (False, True):
            with pytest.raises(GuestFault):
                view.reach(gva, write=write)
    at = guest.base | 0xFFFF_F000 if guest.paging.levels == 3 else (1 << 47) - PAGE
    guest.call(Call.FRAMES, at, 0, 600)  # an event of the guest's, or an error
    audit(guest)


def test_page_tables_and_their_walks_are_bounded(
    guest: PvGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging_pv, "MOST_TABLES", len(guest.paging.traced))
    assert guest.map(DATA, 0) == 1
    assert guest.change((guest.hpa(DATA) | Change.PIN, 0)) == Error.INVALID
    assert "page tables" in guest.guest.last_refused
    monkeypatch.undo()
    monkeypatch.setattr(domain, "MOST_WALKED", 1)
    pair = [(guest.hpa(DATA) | one, 0) for one in (Change.PIN, Change.UNPIN)]
    assert guest.change(*pair) == 2
    assert guest.change(*pair, *pair) == Error.INVALID
    assert "change 2: so many page tables at once" in guest.guest.last_refused
    audit(guest)
