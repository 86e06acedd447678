"""Two guests, their devices and a host that lends their memory out, in any order.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".  The machine that is sound
passes; each fault that is planted here is found by it.
"""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.property.lending import FRAMES, OFFSETS, Lending
from tests.property.playing import play
from understudy.arch.address import PAGE_SHIFT
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.frames import Frames
from understudy.machine.p2m import P2m
from understudy.machine.words import PRESENT, Flag
from understudy.overcommit.merging import Match, Merger
from understudy.overcommit.swap import LOOKED, Swap
from understudy.overcommit.victims import Victims
from understudy.paging import Paging

LENGTH = 60  # steps of one machine
ALL = 600  # frames: more than a guest has
vms = cpus = st.integers(0, 1)
pages = st.integers(0, FRAMES - 1)
values = st.sampled_from((0, 1, 2, 0x100))  # the last one has the hash of the first
offsets = st.sampled_from(OFFSETS)


def machine(paging: str) -> type[RuleBasedStateMachine]:
    """The state machine for one technique."""

    class LendingMachine(RuleBasedStateMachine):
        done = 0

        @initialize(victims=st.sampled_from(sorted(Victims.ALL)), is_whole=st.booleans(),
                    looks_up=st.booleans())  # fmt: skip
        def begin(self, victims: str, is_whole: bool, looks_up: bool) -> None:
            self.lending = Lending(paging, victims, is_whole, looks_up)

        def teardown(self) -> None:
            if hasattr(self, "lending"):
                self.lending.close()

        def _end_step(self) -> None:
            self.lending.audit()
            type(self).done += 1

        @rule(n=vms, cpu=cpus, page=pages, offset=offsets)
        def load(self, n: int, cpu: int, page: int, offset: int) -> None:
            self.lending.load(n, cpu, page, offset)
            self._end_step()

        @rule(n=vms, cpu=cpus, page=pages, offset=offsets, value=values)
        def store(self, n: int, cpu: int, page: int, offset: int, value: int) -> None:
            self.lending.store(n, cpu, page, offset, value)
            self._end_step()

        @rule(n=vms, cpu=cpus, page=pages, value=values)
        def fill(self, n: int, cpu: int, page: int, value: int) -> None:
            self.lending.fill(n, cpu, page, value)
            self._end_step()

        @rule(n=vms, page=pages, value=values)
        def dma(self, n: int, page: int, value: int) -> None:
            self.lending.dma(n, page, value)
            self._end_step()

        @rule(n=vms, page=pages)
        def pin(self, n: int, page: int) -> None:
            self.lending.pin(n, page)
            self._end_step()

        @rule(value=values)
        def dma_to_pinned(self, value: int) -> None:
            self.lending.dma_to_pinned(value)
            self._end_step()

        @rule(n=vms, page=pages)
        def unpin(self, n: int, page: int) -> None:
            self.lending.unpin(n, page)
            self._end_step()

        @rule(count=st.sampled_from((20, ALL)))
        def scan(self, count: int) -> None:
            self.lending.scan(count)
            self._end_step()

        @rule(n=vms, cpu=cpus, page=pages, value=values)
        def share_and_write(self, n: int, cpu: int, page: int, value: int) -> None:
            """What a processor has just written becomes like what the other VM has."""
            self.lending.fill(0, cpu, page, value)
            self.lending.fill(1, cpu, page, value)
            self.lending.scan(2 * ALL)
            self.lending.store(n, cpu, page, OFFSETS[0], value + 1)
            self._end_step()

        @rule(n=vms, cpu=cpus, page=pages, value=values, swaps=st.booleans())
        def pin_and_disturb(self, n: int, cpu: int, page: int, value: int, swaps: bool) -> None:
            """The host wants the frame to which a device is just writing."""
            self.lending.fill(1 - n, cpu, page, value)
            self.lending.fill(n, cpu, page, value)
            self.lending.pin(n, page)
            if swaps:
                self.lending.reclaim(n, ALL)
            else:
                self.lending.scan(2 * ALL)
            self.lending.dma_to_pinned(value + 1)
            self._end_step()

        @rule(n=vms, count=st.sampled_from((1, 5, ALL)))
        def reclaim(self, n: int, count: int) -> None:
            self.lending.reclaim(n, count)
            self._end_step()

        @rule(count=st.sampled_from((1, 5, ALL)))
        def reclaim_common(self, count: int) -> None:
            self.lending.reclaim_common(count)
            self._end_step()

        @rule(n=vms, page=pages, what=st.sampled_from(("inflate", "deflate", "report")))
        def balloon(self, n: int, page: int, what: str) -> None:
            self.lending.balloon(n, page, what)
            self._end_step()

        @rule(n=vms, page=pages)
        def move(self, n: int, page: int) -> None:
            self.lending.move(n, page)
            self._end_step()

        @rule(n=vms, how=st.sampled_from(("load", "copy")))
        def replace(self, n: int, how: str) -> None:
            self.lending.replace(n, how)
            self._end_step()

        @rule(n=vms, what=st.sampled_from(("keep", "keep", "let_go", "come_back")))
        def image(self, n: int, what: str) -> None:
            getattr(self.lending, what)(n)
            self._end_step()

        @rule(n=vms, count=st.sampled_from((1, 5, ALL)))
        def reclaim_image(self, n: int, count: int) -> None:
            self.lending.reclaim_image(n, count)
            self._end_step()

    return LendingMachine


def check(paging: str, steps: int) -> None:
    """Run machines of up to `LENGTH` steps until so many steps are done in all."""
    play(machine(paging), steps, LENGTH)


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_no_byte_and_no_frame_is_lost(paging: str) -> None:
    check(paging, 500)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_hundred_thousand_steps(paging: str) -> None:
    check(paging, 100_000)


# --- faults that are planted ---

Plant = Callable[[pytest.MonkeyPatch], None]


def no_protection(patch: pytest.MonkeyPatch) -> None:
    """A frame becomes another's, and both may write to it."""
    protect = P2m.protect

    def forgetful(p2m: P2m, gfn: int, count: int = 1, flag: int = Flag.SEALED) -> None:
        if flag != Flag.SHARED:
            protect(p2m, gfn, count, flag)

    patch.setattr(P2m, "protect", forgetful)


def stale_translations(patch: pytest.MonkeyPatch) -> None:
    """Nobody who keeps translations hears that a frame became another's."""
    attempt = Merger._try

    def silent(merger: Merger, matches: list[Match]) -> list[Match]:
        told = {row.p2m: row.p2m.watchers for match in matches for row in match.rows}
        for p2m in told:
            p2m.watchers = []
        try:
            return attempt(merger, matches)
        finally:
            for p2m, watchers in told.items():
                p2m.watchers = watchers

    patch.setattr(Merger, "_try", silent)


def hash_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Equal hashes are taken for equal contents."""
    patch.setattr(Merger, "_are_equal", lambda _, pairs: [1] * len(pairs))


def shares_pinned(patch: pytest.MonkeyPatch) -> None:
    """A device writes to a frame that is shared."""
    patch.setattr(Merger, "_is_pinned", lambda *_: False)


def swaps_pinned(patch: pytest.MonkeyPatch) -> None:
    """A frame goes that a device writes to."""

    def careless(swap: Swap, p2m: P2m, gfn: int) -> bool:
        word = p2m.word(gfn)
        owners = swap._frames.references(word >> PAGE_SHIFT) if word & PRESENT else 0
        return bool(owners) and not word & LOOKED and owners - (gfn in swap._pinned[p2m]) == 1

    patch.setattr(Swap, "_may_go", careless)


def leaks_a_copied_frame(patch: pytest.MonkeyPatch) -> None:
    """Whoever gets a copy stays an owner of what it was copied from."""
    write = CopyOnWrite.write

    def forgetful(owner: CopyOnWrite, p2m: P2m, gfn: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Frames, "free", lambda *_: None)
            write(owner, p2m, gfn)

    patch.setattr(CopyOnWrite, "write", forgetful)


def counts_no_owner(patch: pytest.MonkeyPatch) -> None:
    """A frame has two owners, and only one is known."""
    attempt = Merger._try

    def forgetful(merger: Merger, matches: list[Match]) -> list[Match]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Frames, "share_all", lambda *_: None)
            return attempt(merger, matches)

    patch.setattr(Merger, "_try", forgetful)


PLANTS: tuple[Plant, ...] = (
    no_protection, stale_translations, hash_is_enough, shares_pinned, swaps_pinned,
    leaks_a_copied_frame, counts_no_owner,
)  # fmt: skip


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Plant, paging: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(BaseException) as found:
            check(paging, 3000)
    assert "AssertionError" in repr(found.value), found.value
