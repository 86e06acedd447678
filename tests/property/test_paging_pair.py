"""Every way to virtualise memory, with two processors that share the guest's tables.

What: the state machine of `test_paging`, in which it is now one processor's turn and now the
other's, and a kernel's shootdown: one edits an entry that both use, invalidates it, has the other
invalidate it, and both use it again.
Source: SDM 3A, "Propagation of Paging-Structure Changes to Multiple Processors".
What is checked: see `paging_pair`; that it can fail: the mutations below.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.property.paging_machine import DATA, EDITS, FORMATS, PLACES, TABLES
from tests.property.paging_oracle import IA32, INTEL64, NX, RW, US, A, Access, D, Mode, P
from tests.property.paging_pair import Pair
from tests.property.playing import play
from tests.property.test_paging import LENGTH, addresses, levels, machine
from understudy.execution.vmx.technique import Vmx
from understudy.paging import Paging
from understudy.paging.mirror import Mirror, MirrorView
from understudy.paging.roles import BY_MODE
from understudy.paging.shadow import Shadow
from understudy.paging.vtlb import VtlbView
from understudy.vcpu.activity import Goal

ROOMS = (0, 0, 0, 10, 14, 18)
"""The budget, in tables (0: the usual one); two roots are always in use."""
SHADOWS = sorted(set(Paging.ALL) - {"ept"})
Patch = pytest.MonkeyPatch


def pair(
    paging: str, shape_name: str, rooms: tuple[int, ...] = ROOMS
) -> type[RuleBasedStateMachine]:
    """The state machine for two processors."""
    shape = FORMATS[shape_name]
    gvas = st.sampled_from(addresses(shape_name))
    flips = st.sampled_from([RW, US, A, D, A | D, RW | D, P] + [NX] * (shape is not IA32))
    uses = st.tuples(*[st.tuples(st.booleans(), st.booleans())] * 4)
    depth = len(levels(shape)) - 1

    class PairMachine(machine(paging, shape_name, rooms, Pair)):  # type: ignore[misc]
        def pair(self) -> Pair:
            """Both."""
            made: Pair = self.machine
            return made

        @rule()
        def turn(self) -> None:
            self.pair().turn()

        @rule()
        def turn_back(self) -> None:
            self.pair().turn()

        @rule(gva=gvas, above=st.sampled_from([0, 0, 0, 1, 1, 2, 3]), flips=flips, uses=uses,
              how=st.sampled_from(EDITS), plan=st.integers(0, 15))  # fmt: skip
        def shoot_down(
            self, gva: int, above: int, flips: int, uses: tuple[tuple[bool, bool], ...], how: str,
            plan: int,
        ) -> None:  # fmt: skip
            """In the same address space or each in its own; with a shootdown, or not yet."""
            both = self.pair()
            if plan & 1:
                both.same_space()
            first, second, third, last = (
                Access(gva, write, user=user, ac=True) for write, user in uses
            )
            both.touch(first, 0x5AFE_0100)
            both.beside(second, 0x5AFE_0102)
            place = both.entry_of(gva, max(0, depth - above))
            if place is not None and place[0] in TABLES:
                self._edit(*place, both.oracle.entry_at(*place) ^ flips, how)
            if plan & 2:
                both.beside(third, 0x5AFE_0104)
            if plan & 4:
                both.shoot_down(gva)
            elif plan & 8:
                both.reload()
            both.beside(third, 0x5AFE_0106)
            both.touch(last, 0x5AFE_0108)

    return PairMachine


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_for_both_never_stale_and_eventually_complete(paging: str, shape_name: str) -> None:
    play(pair(paging, shape_name), 200, LENGTH)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_hundred_thousand_steps_of_two(paging: str, shape_name: str) -> None:
    play(pair(paging, shape_name), 100_000, LENGTH)


def lend(paging: str) -> int | None:
    """One processor is lent the right to write a page; the error code of the other's write."""
    gva, rights = 0x1000, P | US | A | D
    both = Pair(paging, INTEL64, [gva], 0)
    try:
        way = [*TABLES[:1], *TABLES[2:5], DATA[0]]
        for (here, there), more in zip(itertools.pairwise(way), (RW, RW, RW, 0), strict=True):
            both.edit(here, 1 if here == way[-2] else 0, there << 12 | rights | more, "store")
        both.set_mode(Mode(wp=False))
        both.reload()
        both.begin(both.kernel_code + PLACES["store"], rdi=gva, eax=1)
        both.vcpu.run(Goal(None, lambda: True))  # up to its fault
        assert both.vcpu.view.is_watched
        both.turn()
        done = both.gadget("store", rdi=gva, eax=2)
        both.turn()
        assert both.finish().error is None
        assert both.real(DATA[0])[:4] == (1).to_bytes(4, "little")
        return done.error
    finally:
        both.close()


@pytest.mark.parametrize("paging", SHADOWS)
def test_rights_are_lent_to_one_processor(paging: str) -> None:
    assert lend(paging) == 3


@pytest.mark.parametrize("paging", ["eager", "lazy"])
def test_lent_rights_that_are_not_taken_back_are_found(paging: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(MirrorView, "begin_turn", nothing)
    assert lend(paging) is None


# --- that it can fail ---


def nothing(*_args: Any, **_more: Any) -> None:
    """Instead of what should be done."""


def only_who_caused_it_is_told(patch: Patch) -> None:
    """Of an entry that has gone, no other processor hears."""
    plain = Mirror.tell

    def tell(self: Mirror, view: MirrorView, stale: set[int] | None) -> None:
        if view.guest.thread:
            plain(self, view, stale)

    patch.setattr(Mirror, "tell", tell)


def requests_are_not_paid(patch: Patch) -> None:
    """A processor that was told to forget something goes on with it."""
    patch.setattr(Vmx, "pay", nothing)


def one_region_cache(patch: Patch) -> None:
    """What one has found on its way through the tables the others use, too."""
    plain = Shadow.attach

    def attach(self: Any, guest: Any) -> Any:
        view = plain(self, guest)
        view.regions = self.views[0].regions
        return view

    patch.setattr(Shadow, "attach", attach)


def one_tlb(patch: Patch) -> None:
    """A processor's virtual TLB is another's."""

    plain = VtlbView.cr3_write

    def cr3_write(self: VtlbView) -> None:
        plain(self)
        for view in self.shadow.views:
            self.guest.load_root(view.root)

    patch.setattr(VtlbView, "cr3_write", cr3_write)


def roles_are_mixed_up(patch: Patch) -> None:
    """Tables that two read differently have one shadow."""
    patch.setattr("understudy.paging.guest_tables.role_of", lambda regime: by_format(regime))


def by_format(regime: Any) -> Any:
    """The role in which XD is not reserved."""
    return BY_MODE[regime.format, regime.entry_bytes == 8]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mutation", "paging", "shape_name"),
    [
        (only_who_caused_it_is_told, "eager", "Intel 64"),
        (only_who_caused_it_is_told, "lazy", "PAE"),
        (requests_are_not_paid, "eager", "IA-32"),
        (requests_are_not_paid, "ept", "Intel 64"),
        (one_region_cache, "eager", "Intel 64"),
        (one_tlb, "vtlb", "Intel 64"),
        (roles_are_mixed_up, "eager", "PAE"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(
    mutation: Callable[[Patch], None], paging: str, shape_name: str, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(Exception) as caught:
        play(pair(paging, shape_name), 20_000, LENGTH)
    assert not isinstance(caught.value, AttributeError | NameError), caught.value
