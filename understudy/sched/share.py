"""Proportional share: each vCPU gets processor time in proportion to its VM's weight.

Idea: start-time fair queueing.  A vCPU has a virtual time, which advances by what it ran divided by
its weight; the one that is furthest behind goes next.  Chosen over a credit scheme because shares
follow within one slice of each other at any moment, whatever the period one looks at, and nothing
is handed out periodically.  One queue for the pool's pCPUs: none idles while somebody waits.

Source: Goyal, Guo, Vin, "A Hierarchical CPU Scheduler for Multimedia Operating Systems" (1996);
Waldspurger, Weihl, "Stride Scheduling" (1995); for caps: Xen, "Credit Scheduler".
Invariants: a vCPU that slept has no claim on the time that it slept, but for half a slice, so that
it soon runs; a VM with a cap never gets more of any period than that and one turn.
"""

from typing import Final

from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import NEVER, Policy
from understudy.sched.seat import Claim, Seat

SLICE_NS: Final = 5_000_000
PERIOD_NS: Final = 100_000_000  # of caps
SCALE: Final = 1 << 10  # of virtual time, beside ns


class Share(Policy, name="share"):
    """Virtual times, in ns of a vCPU of weight 1, scaled."""

    keeps = True

    def __init__(self, *, slice_ns: int = SLICE_NS) -> None:
        """`slice_ns`: how long a vCPU runs if another waits."""
        if slice_ns <= 0:
            raise ValueError(f"slice_ns={slice_ns}: expected more than 0")
        self.slice_ns = slice_ns
        self.now = 0  # the least virtual time of those that run or wait; never goes back
        self.queue: dict[Seat, int] = {}  # who waits, and since which event
        self.running: dict[
            int, tuple[Seat, int, int]
        ] = {}  # by pCPU: who, since when, charged up to
        self.favored: dict[int, Seat] = {}  # by pCPU: who is to have it next
        self.events = 0
        self.spent: dict[Claim, tuple[int, int]] = {}  # of those with a cap: period, ns used

    def arrive(self, seat: Seat, now: int) -> None:
        seat.key = self.now

    def leave(self, seat: Seat, now: int) -> None:
        self.spent.pop(seat.claim, None)

    def wake(self, seat: Seat, now: int) -> Pcpu | None:
        seat.key = max(seat.key, self.now - self._half(seat))
        self._enqueue(seat)
        if len(self.running) < len(self.pcpus):
            return None
        # Whoever is furthest ahead gives way, if that one is ahead of the one that woke.
        furthest = max(
            (pcpu for pcpu in self.pcpus if pcpu.number in self.running),
            key=lambda pcpu: self._virtual(pcpu.number, now), default=None,
        )  # fmt: skip
        is_behind = furthest is not None and seat.key < self._virtual(furthest.number, now)
        return furthest if is_behind else None

    def block(self, seat: Seat, now: int) -> None:
        self.queue.pop(seat, None)
        for number, (runs, *_) in list(self.running.items()):
            if runs is seat:
                self._charge(number, now)
                del self.running[number]

    def tick(self, pcpu: Pcpu, seat: Seat, now: int, asked: bool) -> bool:
        self._charge(pcpu.number, now)
        is_over = bool(self.queue) and now - self.running[pcpu.number][1] >= self.slice_ns
        if is_over or asked or self._is_capped(seat.claim, now):
            del self.running[pcpu.number]
            self._enqueue(seat)
            return True
        return False

    def pick(self, pcpu: Pcpu, now: int) -> Seat | None:
        free = [seat for seat in self.queue if not self._is_capped(seat.claim, now)]
        if not free:
            return None
        favored = self.favored.pop(pcpu.number, None)
        if favored in free:
            free = [favored]
        least = min([seat.key for seat in self.queue])
        self.now = max(self.now, least)
        seat = free[0]
        if len(free) > 1:
            # One that was here before is preferred to one that is hardly further behind.
            near = [seat for seat in free if seat.key <= least + self._half(seat)]
            near = [seat for seat in near if seat.pcpu == pcpu.number] or free
            seat = min(near, key=lambda one: (one.key, self.queue[one]))
        del self.queue[seat]
        self.running[pcpu.number] = seat, now, now
        return seat

    def favor(self, pcpu: Pcpu, seat: Seat, other: Seat, now: int) -> bool:
        if self._is_capped(other.claim, now):
            return False
        self._charge(pcpu.number, now)
        del self.running[pcpu.number]
        self._enqueue(seat)
        self.favored[pcpu.number] = other
        return True

    def due(self) -> int:
        """The next period, in which those that have used up their caps go on."""
        capped = [self.spent[seat.claim][0] for seat in self.queue if seat.claim in self.spent]
        return (min(capped) + 1) * PERIOD_NS if capped else NEVER

    # --- snapshots ---

    def save(self, seat: Seat) -> dict[str, int]:
        saved = {"key": seat.key, "now": self.now}
        if seat in self.queue:
            saved["place"] = self.queue[seat]
        for number, (runs, since, charged) in self.running.items():
            if runs is seat:
                saved |= {"pcpu": number, "began": since, "charged": charged}
        if seat.claim in self.spent:
            saved["period"], saved["used"] = self.spent[seat.claim]
        return saved

    def load(self, seat: Seat, saved: dict[str, int]) -> None:
        seat.key, self.now = saved["key"], max(self.now, saved["now"])
        if "place" in saved:
            self.queue[seat] = saved["place"]
            self.events = max(self.events, saved["place"])
        if "pcpu" in saved:
            self.running[saved["pcpu"]] = seat, saved["began"], saved["charged"]
        if "period" in saved:
            self.spent[seat.claim] = saved["period"], saved["used"]

    # --- what was used ---

    def _enqueue(self, seat: Seat) -> None:
        self.events += 1
        self.queue[seat] = self.events

    def _half(self, seat: Seat) -> int:
        """Half a slice of its virtual time."""
        return int(self.slice_ns // 2 * SCALE / seat.weight)

    def _virtual(self, number: int, now: int) -> int:
        """The virtual time of the one that runs there, as it would be now."""
        seat, _, charged = self.running[number]
        return int(seat.key + int((now - charged) * SCALE / seat.weight))

    def _charge(self, number: int, now: int) -> None:
        seat, since, charged = self.running[number]
        seat.key = self._virtual(number, now)
        self.running[number] = seat, since, now
        if seat.claim.cap is not None:
            period, used = self._spent(seat.claim, now)
            self.spent[seat.claim] = period, used + now - charged
        waiting = [one.key for one in self.queue] + [one.key for one, *_ in self.running.values()]
        self.now = max(self.now, min(waiting))

    def _spent(self, claim: Claim, now: int) -> tuple[int, int]:
        """What it has used of this period's; what was too much before counts as well."""
        period = now // PERIOD_NS
        before, used = self.spent.get(claim, (period, 0))
        if before != period:
            assert claim.cap is not None
            used = max(0, used - int(claim.cap * PERIOD_NS) * (period - before))
        return period, used

    def _is_capped(self, claim: Claim, now: int) -> bool:
        if claim.cap is None:
            if self.spent:
                self.spent.pop(claim, None)
            return False
        self.spent[claim] = self._spent(claim, now)
        return self.spent[claim][1] >= claim.cap * PERIOD_NS
