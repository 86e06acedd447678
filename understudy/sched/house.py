"""Who is in a host's house: its pools, pCPUs and VMs, and who of them is where.

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: a pool's policy hears of every change, in the order of time; a vCPU is on one pCPU at
most; what cannot be is refused (PolicyError), and nothing has changed then.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from understudy.bell import Bell
from understudy.sched.host_time import HostTime, RealTime
from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import Policy, PolicyError
from understudy.sched.pool import Pool
from understudy.sched.seat import Claim, Seat, State
from understudy.silicon import Processor
from understudy.turns import GRAIN
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop

DEFAULT: Final = "default"
H = TypeVar("H", bound="House")
P = ParamSpec("P")
R = TypeVar("R")


def changes(act: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
    """This changes who is where: on a host whose pCPUs have threads, with all of them."""

    @wraps(act)
    def done(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.changing():
            return act(self, *args, **kwargs)

    return done


class House:
    """The pCPUs of a host and all who may run on them."""

    def __init__(self, processors: Sequence[Processor], policy: Policy, *, is_wall: bool) -> None:
        self.pcpus = [Pcpu(number, one) for number, one in enumerate(processors)]
        self.is_wall = is_wall
        self.time = RealTime() if is_wall else HostTime(processors[0])
        self.pools = {DEFAULT: Pool(DEFAULT, policy)}
        for pcpu in self.pcpus:
            self._join(pcpu, self.pools[DEFAULT])
        self.claims: list[Claim] = []
        self.is_fresh = True  # nothing has run yet
        self.news = Bell()
        self.poked: deque[Seat] = deque()  # they were told something
        self._restless: set[Claim] = set()  # their boards have a new timer
        self.turn: tuple[Pcpu, Seat, int] | None = None  # one that was cut, and its end

    def changing(self) -> AbstractContextManager[None]:
        """Inside, this thread may change who is where."""
        return nullcontext()

    # --- who takes part ---

    @changes
    def admit(self, claim: Claim, pool: str = DEFAULT) -> None:
        """One more VM.  PolicyError if the pool has no room for it."""
        now = self.time.now()
        for seat in claim.seats:
            seat.since = seat.counted = now
            seat.vcpu.poke = lambda seat=seat: self.poke(seat)  # type: ignore[misc]
        claim.clock.changed.append(lambda: self._restless.add(claim))
        self.claims.append(claim)
        try:
            self._enter(claim, self._pool(pool))
        except PolicyError:
            self.claims.remove(claim)
            raise
        self._restless.add(claim)

    def clock(self) -> GuestClock:
        """One for a VM that is to come: its time begins now."""
        clock = GuestClock(self.time.now)
        clock.offset = -(self.time.now() // GRAIN * GRAIN)
        return clock

    def resume_clock(self, clock: GuestClock, offset: int, now: int) -> None:
        """A VM comes of a snapshot: its time goes on.

        So does that of the host, if nothing has run here yet.
        """
        host = now - offset
        if self.is_fresh and not self.is_wall and host > self.time.now():
            self.pcpus[0].processor.advance(host - self.time.now())
        if host != self.time.now() or offset % GRAIN or self.is_wall:
            offset = -(self.time.now() - now) // GRAIN * GRAIN
        clock.offset = offset

    def _enter(self, claim: Claim, pool: Pool) -> None:
        if not pool.pcpus:
            raise PolicyError(f"{pool!r} has no pCPU")
        now, done = self.time.now(), list[Seat]()
        try:
            for seat in claim.seats:
                pool.policy.arrive(seat, now)
                done.append(seat)
        except PolicyError:
            for seat in done:
                pool.policy.leave(seat, now)
            raise
        claim.pool = pool.name
        pool.seats += claim.seats
        for seat in claim.seats:
            seat.become(State.BLOCKED if claim.ended is None else State.AWAY, now)
            self.poke(seat)

    @changes
    def dismiss(self, claim: Claim) -> None:
        """It takes part no more: its vCPUs are on no pCPU then."""
        self._leave(claim)
        self.claims.remove(claim)
        for seat in claim.seats:
            for pcpu in self.pcpus:
                if pcpu.there is seat:
                    self._clear(pcpu)

    def _leave(self, claim: Claim) -> None:
        now, pool = self.time.now(), self.pools[claim.pool]
        for seat in claim.seats:
            self._stand(seat, State.AWAY, "leave", now)
            pool.policy.leave(seat, now)
            pool.seats.remove(seat)

    def settle(self) -> None:
        """Count all times up to now."""
        now = self.time.now()
        for pcpu in self.pcpus:
            if pcpu.seat is not None:
                pcpu.running_ns += now - pcpu.seat.counted
        for claim in self.claims:
            for seat in claim.seats:
                seat.settle(now)

    @changes
    def end(self, claim: Claim, stop: Stop) -> None:
        """It stops, and may go on later."""
        claim.ended, now = stop, self.time.now()
        for seat in claim.seats:
            self._stand(seat, State.AWAY, "end", now)

    @changes
    def resume(self, claim: Claim) -> None:
        """It goes on."""
        claim.ended, now = None, self.time.now()
        for seat in claim.seats:
            if seat.state is State.AWAY:
                seat.become(State.BLOCKED, now)
                self.poke(seat)
        self._restless.add(claim)

    # --- pools ---

    def _join(self, pcpu: Pcpu, pool: Pool) -> None:
        pcpu.pool = pool.name
        pool.pcpus.append(pcpu)
        pool.pcpus.sort(key=lambda one: one.number)

    @changes
    def add_pool(self, name: str, policy: Policy) -> Pool:
        """A pool without pCPUs."""
        if name in self.pools:
            raise PolicyError(f"pool {name!r}: there is one already")
        self.pools[name] = Pool(name, policy)
        return self.pools[name]

    @changes
    def move_pcpu(self, number: int, name: str) -> None:
        """To another pool, while VMs run.  PolicyError if it cannot go."""
        if not 0 <= number < len(self.pcpus):
            raise PolicyError(f"pCPU {number}: expected 0 to {len(self.pcpus) - 1}")
        pcpu, pool, now = self.pcpus[number], self._pool(name), self.time.now()
        old = self.pools[pcpu.pool]
        if pool is old:
            return
        if len(old.pcpus) == 1 and old.seats:
            raise PolicyError(f"pCPU {number} is the last of {old!r}, which has vCPUs")
        if pcpu.seat is not None:
            self._yield(pcpu, "move", now)
        old.pcpus.remove(pcpu)
        try:
            old.policy.changed(now)
        except PolicyError:
            self._join(pcpu, old)
            raise
        self._join(pcpu, pool)
        pool.policy.changed(now)

    @changes
    def move_claim(self, claim: Claim, name: str) -> None:
        """A VM to another pool, while it runs.  PolicyError if there is no room."""
        old, pool = self.pools[claim.pool], self._pool(name)
        if pool is old:
            return
        self._leave(claim)
        try:
            self._enter(claim, pool)
        except PolicyError:
            self._enter(claim, old)
            raise

    @changes
    def use_policy(self, name: str, policy: Policy) -> None:
        """Another policy for a pool, while VMs run.  PolicyError if it has no room for them."""
        pool, now = self._pool(name), self.time.now()
        for pcpu in pool.pcpus:
            if pcpu.seat is not None:
                self._yield(pcpu, "policy", now)
        pool.use(policy, now)

    def _pool(self, name: str) -> Pool:
        if name not in self.pools:
            raise PolicyError(f"pool {name!r}: expected one of {', '.join(self.pools)}")
        return self.pools[name]

    # --- what happens to a seat ---

    def poke(self, seat: Seat) -> None:
        """From any thread: it was told something, which may wake it."""
        self.poked.append(seat)
        self.hear(seat)

    def hear(self, seat: Seat) -> None:
        """From any thread: have it looked at who was told something."""
        self.news.ring()

    def forget_pokes(self, claim: Claim, others: Sequence[int]) -> None:
        """Of the vCPUs of a VM these were told something, and no other."""
        kept = [seat for seat in self.poked if seat.claim is not claim]
        self.poked.clear()
        self.poked.extend(kept)
        self.poked.extend(seat for n in others for seat in claim.seats if seat.number == n)

    def _wake(self, seat: Seat, now: int, since: int | None = None) -> None:
        """If it has something to do: perhaps since a moment before now."""
        if seat.state is not State.BLOCKED or seat.vcpu.is_idle:
            return
        self._want(seat, now)
        seat.woken_at = now if since is None else since
        pcpu = self.pools[seat.claim.pool].policy.wake(seat, now)
        if pcpu is not None:
            self._preempt(pcpu)

    def _want(self, seat: Seat, now: int) -> None:
        """It waits for a pCPU from now on."""
        seat.become(State.RUNNABLE, now)

    def _preempt(self, pcpu: Pcpu) -> None:
        """Have its policy look at the next boundary who goes on there."""
        pcpu.preempted = True

    def _stand(self, seat: Seat, state: State, reason: str, now: int) -> None:
        """It runs no more, nor does it want to."""
        if seat.state in (State.RUNNING, State.RUNNABLE):
            self.pools[seat.claim.pool].policy.block(seat, now)
        for pcpu in self.pcpus:
            if pcpu.seat is seat:
                self._free(pcpu, reason, now)
        seat.become(state, now)

    def _yield(self, pcpu: Pcpu, reason: str, now: int) -> None:
        """The one that runs there waits again, for its policy's sake or another's."""
        seat = pcpu.seat
        assert seat is not None
        self._stand(seat, State.RUNNABLE, reason, now)
        self.pools[seat.claim.pool].policy.wake(seat, now)

    def _free(self, pcpu: Pcpu, reason: str, now: int) -> None:
        """Nobody runs there, but its registers stay until another one comes."""
        seat = pcpu.seat
        assert seat is not None
        pcpu.running_ns += now - seat.counted
        pcpu.seat, pcpu.reason, pcpu.preempted, pcpu.end = None, reason, False, 0
        if self.turn is not None and self.turn[0] is pcpu:
            self.turn = None
        if seat.vcpu.kvm.tells:
            seat.vcpu.kvm.leave()

    def _clear(self, pcpu: Pcpu) -> None:
        if pcpu.there is not None:
            vcpu = pcpu.there.vcpu
            if vcpu.guest.is_inside or vcpu.time.debt:
                vcpu.leave_guest()
            vcpu.guest.take_off()
            pcpu.there = None

    def _put(self, pcpu: Pcpu, seat: Seat, now: int) -> None:
        """It runs there from now on."""
        old = pcpu.there
        if old is not seat:
            if seat.pcpu is not None and self.pcpus[seat.pcpu].there is seat:
                self._clear(self.pcpus[seat.pcpu])
            if old is not None:
                self._clear(pcpu)
                old.counts.switches[pcpu.reason] += 1
                pcpu.switches[pcpu.reason] += 1
            if seat.pcpu is not None and seat.pcpu != pcpu.number:
                seat.counts.migrations += 1
            pcpu.there, seat.pcpu = seat, pcpu.number
        seat.vcpu.guest.place(pcpu.processor)
        pcpu.seat, pcpu.preempted = seat, False
        has_waited = now > seat.since and seat.state is State.RUNNABLE
        seat.become(State.RUNNING, now)
        if has_waited:
            seat.claim.stolen(seat.number, seat.counts.steal_ns)
