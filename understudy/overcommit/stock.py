"""A host's stock of frames, when its VMs have more memory than it.

Idea: as long as all VMs fit, nothing happens.  From the first one on that does not, frames are
taken when they are first used; guest frames are scanned to be shared; working sets are sampled; and
each second, or as soon as few frames are free, it is looked who has more than the plan gives him
and by which means he gives it up: his balloon, else the swap file.

A promise: no VM ends because another one wants memory, and no page is lost.  Whoever misses a frame
gets one at once; what the others need least goes first.  `why` says what is slow, and why.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".
Invariants: host time alone decides when, so a run in virtual time is the same each time; while an
exit of a guest is answered no frame of that guest goes and no frame changes its rights: a part of
the RAM is kept free for that, and is free again before the guest goes on.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Final

from understudy.arch.address import PAGE
from understudy.clock import NS_PER_SECOND
from understudy.machine.ballooned import Ballooned
from understudy.machine.frame_table import MOST
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import P2m
from understudy.overcommit.gathering import Gathering
from understudy.overcommit.holding import Holding, Ways
from understudy.overcommit.images import Images
from understudy.overcommit.plan import (
    Need,
    Order,
    Shortage,
    State,
    admit,
    orders,
    plan_of,
)
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.swap import Swap
from understudy.overcommit.swap_file import SwapError
from understudy.overcommit.terms import Terms
from understudy.quantities import bytes_of

PERIOD_NS: Final = NS_PER_SECOND
SAMPLED_S: Final = 30
LEAST_BUFFER: Final = 64  # frames
CLUSTER: Final = 64  # frames that go at once when none is free in the middle of an exit


class Stock:
    """The frames of one host, as `machine.host.Room`."""

    def __init__(
        self, host: Host, terms: Terms, begun: Callable[[], None], *, is_wall: bool
    ) -> None:  # fmt: skip
        """Nothing happens before a VM is admitted that does not fit, but for `terms.is_always`.

        `begun` is called then: from that moment on `tick` is to be called each `PERIOD_NS`.
        """
        self._begun, self._is_wall = begun, is_wall
        self.host, self.terms, self._frames = host, terms, host.frames
        self.plan = plan_of(terms.plan)
        self.total = host.frames.free_count
        self.shortage = Shortage(self.total)
        self.buffer = max(int(self.shortage.threshold(State.HARD)), LEAST_BUFFER)
        self.holdings: dict[P2m, Holding] = {}
        self.images = Images(host)
        self.sharing: Sharing | None = None
        self.gathering = Gathering(host)
        self.swap: Swap | None = None
        self.orders: list[Order] = []
        self._trouble = ""  # of the swap file
        self.looks = self.reliefs = 0
        self._seconds = 0
        self._asked: set[P2m] = set()
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_at_work = False

    @property
    def is_on(self) -> bool:
        """Whether its VMs have more memory than the host."""
        return self.swap is not None

    # --- who takes part ---

    def admit(
        self, name: str, memory: GuestMemory, ballooned: Ballooned, minimum: int, shares: int,
        overhead: int, ways: Ways, group: str,
    ) -> Holding:  # fmt: skip
        """One more VM, whose memory is not filled yet.  `minimum`, `overhead`: pages.

        `group`: with whom it may have frames in common.

        PlanError if what is promised to all would not be there.
        """
        new = Holding(
            self._free_name(name), memory, ballooned, minimum, shares, overhead, ways, group
        )
        least = new.maximum + new.overhead
        fits = least <= self._frames.free_count and self._fits(new.need())
        if self.terms.is_always or self.is_on or not fits:
            new.check_sampled()
            self._begin(self._admit(new.need()))
            self._take_in(new)
        self.holdings[memory.p2m] = new
        return new

    def check(self, p2m: P2m, overhead: int) -> None:
        """PlanError if `change` to so many pages would raise it."""
        one = self.holdings[p2m]
        need = replace(one.need(), beside=overhead)
        if self.is_on or not self._fits(need, one):
            self._admit(need, one)

    def change(self, p2m: P2m, overhead: int) -> None:
        """What a VM needs beside its memory, in pages.  PlanError if that would be too much."""
        one = self.holdings[p2m]
        need = replace(one.need(), beside=overhead)
        if self.is_on or not self._fits(need, one):
            self._begin(self._admit(need, one))
        one.overhead = overhead

    def keep(self, image: P2m, source: P2m) -> None:
        """As `Room.keep` says.  PlanError if the swap file has no room for all of it.

        Nobody needs its frames: they go before anybody else's.
        """
        pages = sum(frames for _, _, frames in image.pieces())
        need = Need(f"a snapshot of {self.holdings[source].name}", 0, pages)
        if self.is_on or not self._fits(need):
            self._begin(self._admit(need))
        if self.swap is not None and image.keeper is None:
            self.swap.join(image)
        self.images.add(image, need)

    def let_go(self, image: P2m) -> None:
        """As `Room.let_go` says."""
        self.images.drop(image)

    def later(self, action: Callable[[], None]) -> None:
        """As `Room.later` says: before frames are wanted the next time."""
        self._waiting.append(action)

    def _catch_up(self) -> None:
        """What waits is done, but in the middle of swapping or sharing."""
        while self._waiting and not self._is_at_work:
            with suppress(IndexError):  # another thread was faster
                self._waiting.popleft()()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._catch_up()
        before, self._is_at_work = self._is_at_work, True
        try:
            yield
        finally:
            self._is_at_work = before

    def _needs(self, but: Holding | None) -> list[Need]:
        held = (one.need() for one in self.holdings.values() if one is not but)
        return [*held, *self.images.needs()]

    def _fits(self, new: Need, before: Holding | None = None) -> bool:
        needs = (*self._needs(before), new)
        return sum(need.maximum + need.beside for need in needs) <= self.total

    def _admit(self, new: Need, before: Holding | None = None) -> int:
        """What may go into the swap file, in pages.  PlanError if all that would be too much."""
        others = self._needs(before)
        room = sum(need.maximum - need.minimum for need in (*others, new))
        if self.terms.swap is not None:
            room = bytes_of(self.terms.swap) // PAGE
        admit(new, others, self.total - self.shortage.wanted, room)
        return room

    def _free_name(self, name: str) -> str:
        taken = {one.name for one in self.holdings.values()}
        names = (name, *(f"{name}/{number}" for number in range(2, len(taken) + 3)))
        return next(one for one in names if one not in taken)

    def _begin(self, room: int) -> None:
        """From now on there is more memory than there is: up to so many pages of it are away."""
        if self.swap is not None:
            self.swap.file.slots = max(self.swap.file.slots, room)
            return
        for one in self.holdings.values():
            one.check_sampled()
        terms = self.terms
        if terms.scan or terms.looks_up:
            self.sharing = Sharing(self.host)
        looked_up = self.sharing if terms.looks_up else None
        self.swap = Swap(self.host, room * PAGE, terms.victims, terms.folder, looked_up)
        if self._is_wall:
            self.swap.put_off = self._put_off
        elif terms.read_ns:
            self.swap.on_read = partial(self._put_off, ns=terms.read_ns)
        for one in self.holdings.values():
            self._take_in(one)
            one.ballooned.give_untouched()
        for image in self.images.all():
            self.swap.join(image)
        self._begun()

    def _take_in(self, one: Holding) -> None:
        assert self.swap is not None
        self.swap.join(one.p2m)
        one.swapped = partial(self.swap.swapped_of, one.p2m)
        one.swapped_in = partial(self.swap.read_by.__getitem__, one.p2m)
        if self.sharing is not None:
            self.sharing.join(one.p2m, one.group)
        one.begin()

    def dismiss(self, one: Holding) -> None:
        """A VM is no more; its memory is about to be given back."""
        del self.holdings[one.p2m]
        self._asked.discard(one.p2m)
        self._catch_up()
        one.close()
        self.gathering.leave(one.p2m)
        if self.sharing is not None:
            self.sharing.leave(one.p2m)
        if self.swap is not None:
            self.swap.drop(one.p2m)

    def _put_off(self, p2m: P2m, ns: int) -> bool:
        """Whoever of a VM has missed a page waits for it; False if nobody can."""
        return (holding := self.holdings.get(p2m)) is not None and holding.ways.delay(ns)

    def close(self) -> None:
        """The host is no more."""
        self._catch_up()
        if self.swap is not None:
            self.swap.close()

    # --- frames are wanted ---

    @property
    def is_ample(self) -> bool:
        """As `Room.is_ample` says."""
        return self._frames.free_count > 2 * self.shortage.wanted

    def expect(self, count: int, p2m: P2m | None = None) -> None:
        """As `Room.expect` says."""
        self._catch_up()
        short = count + self.buffer - self._frames.free_count
        if short <= 0 or not self.is_on:
            return
        if p2m is None:
            self._reclaim(short)
            return
        holding = self.holdings.get(p2m)
        is_idle = holding is not None and holding.ways.is_idle()
        if holding is not None and not is_idle and p2m not in self._asked:
            self._asked.add(p2m)  # each, for one may never go on
            holding.ways.post(self.relieve)
        if count > self._frames.free_count:
            self._reclaim(short if is_idle else CLUSTER, None if is_idle else p2m)
        if self._trouble and count > self._frames.free_count:
            raise OutOfFrames(f"no frame is free, and none can be made free{self._trouble}")

    def relieve(self) -> None:
        """Between two exits, when few frames are free: have others give some up at once."""
        if not self._asked:  # somebody else's was enough
            return
        self._asked.clear()
        self.reliefs += 1
        self.look()

    # --- each period ---

    def tick(self) -> None:
        """A second of host time has passed."""
        if not self.is_on:
            return
        with self._at_work():
            self._tick()

    def _tick(self) -> None:
        self._seconds += 1
        self.images.refresh()
        if self.sharing is not None and self.terms.scan:
            self.sharing.scan(self.terms.scan)
        if self._seconds % SAMPLED_S == 1:
            for one in self.holdings.values():
                assert one.sampler is not None
                one.sampler.end()
                if self.is_ample:  # and no frame is away to be sampled
                    self.gathering.look(one.p2m)
                one.sampler.begin()
        self._asked.clear()
        self.look()

    def look(self) -> None:
        """Who has too much, and how he gives it up: have that done."""
        with self._at_work():
            self._look()

    def _look(self) -> None:
        self.looks += 1
        self._trouble = ""
        state = self.shortage.update(self._frames.free_count)
        if state is not State.HIGH:
            self.images.give(self.shortage.wanted, self._swap_out)
            state = self.shortage.update(self._frames.free_count)
        self.orders = self._orders(state)
        by_name = {one.name: one for one in self.holdings.values()}
        owed: dict[P2m, int] = {}
        for order in self.orders:
            one = by_name[order.name]
            one.target = order.target
            if one.steering is not None and self.terms.balloons:
                one.give(self._to_balloon(one, order, state))
            if order.means == "swap":
                owed[one.p2m] = order.gives - self._swap_out(one.p2m, order.gives)
            one.why = one.reason(order.gives, order.means)
        if self._frames.free_count < self.shortage.wanted:  # they have too much, but not alone
            self._swap_out_common(owed, sum(owed.values()))
            for p2m in owed:
                if (one := self.holdings[p2m]).has > one.target:
                    one.thin()  # what it has left are page tables that are followed
        self.expect(0)

    @property
    def why(self) -> str:
        """How short memory is, and what is amiss, in words."""
        if not self.is_on:
            return "all VMs fit into the RAM"
        name = self.shortage.at(self._frames.free_count).name.lower()
        return f"{name}: {self._frames.free_count} of {self.total} frames are free{self._trouble}"

    def _to_balloon(self, one: Holding, order: Order, state: State) -> int:
        """How many pages more its balloon is to take; less than 0: it gives some back."""
        if order.means == "balloon":
            return order.gives
        return min(one.has - order.target, 0) if state is State.HIGH else 0

    def _orders(self, state: State) -> list[Order]:
        needs = [one.need() for one in self.holdings.values()]  # not images: they go before that
        has = {one.name: one.has for one in self.holdings.values()}
        pages = sum(has.values()) + self._frames.free_count - self.shortage.wanted
        pages = max(pages, sum(need.minimum for need in needs))
        balloons = [one.name for one in self.holdings.values() if one.obeys and self.terms.balloons]
        return orders(self.plan, state, needs, pages, has, balloons)

    # --- frames go ---

    def _reclaim(self, count: int, busy: P2m | None = None) -> None:
        """Have so many frames freed, or as many as can be; none of `busy`, nor its rights."""
        self._trouble = ""
        with self._at_work():
            self._free(count, busy)

    def _free(self, count: int, busy: P2m | None) -> None:
        enough = self._frames.free_count + count
        self.images.give(enough, self._swap_out)
        giving = [one for p2m, one in self.holdings.items() if p2m is not busy]
        targets = {order.name: order.target for order in self._orders(self.shortage.state)}
        over = {one.name: max(one.has - targets[one.name], 0) for one in giving}
        giving.sort(key=lambda one: -over[one.name])
        for spare in (lambda one: over[one.name], lambda one: max(one.has - one.minimum, 0)):
            for one in giving:
                left = enough - self._frames.free_count
                if left <= 0:
                    return
                self._swap_out(one.p2m, min(left, spare(one)), looks_up=busy is None)
            left = enough - self._frames.free_count
            self._swap_out_common({one.p2m: spare(one) for one in giving}, left)

    def _swap_out(self, p2m: P2m, count: int, *, looks_up: bool = True) -> int:
        assert self.swap is not None
        if count <= 0:
            return 0
        with self._told():
            return self.swap.reclaim(p2m, count, looks_up=looks_up)
        return 0

    def _swap_out_common(self, spare: dict[P2m, int], count: int) -> None:
        """None of these has a frame left that is his alone and may go: those that several have."""
        assert self.swap is not None
        spare = {p2m: pages for p2m, pages in spare.items() if pages > 0}
        if count > 0 and spare:
            spare |= dict.fromkeys(self.images.all(), MOST)
            with self._told():
                self.swap.reclaim_common(spare, max(count, CLUSTER))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What is amiss with the swap file is said where one asks why."""
        try:
            yield
        except SwapError as problem:
            self._trouble = f"; {problem}"
