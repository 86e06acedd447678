"""The schedule of a host: its pCPUs take turns, and vCPUs are put onto them as policies decide.

In virtual time turn `n` is the time from `n * TURN_NS` on and belongs to pCPU `n mod M`, whatever
is there to do (decision 0050, of which this is the general case).  What happened meanwhile (a
timer, an interrupt, a wish) is looked at between two turns, or when a vCPU has nothing more to do,
so all that policies hear follows from the time alone.  Where nobody has anything to do, time
jumps to what comes next.  In real time a turn goes to the next pCPU that has something to do, on a
host of one pCPU and in runs that end after so many instructions; else see `threads`.

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: a run ends between two instructions, and the turn that it cut goes on in the next run;
a VM that ends disturbs no other; a vCPU that blocks is looked at again only when its own timer is
due or somebody tells it something.
"""

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Final

from understudy.machine.frames import OutOfFrames
from understudy.sched.house import House
from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import NEVER, Policy
from understudy.sched.seat import Claim, Seat, State
from understudy.silicon import Processor, hold_signals
from understudy.turns import TURN_NS, WALL_TURN_NS
from understudy.vcpu.activity import Goal
from understudy.vcpu.time import FAR, passing
from understudy.verdict import ASLEEP, PASSING, YIELDS, Stop, StopKind, Verdict

LIMITS: Final = frozenset({StopKind.WALL, StopKind.DEADLINE, StopKind.STOPPED})
"""What ends a run of a VM, and not the VM."""


@dataclass
class Aim:
    """When a run of the host is over, if nothing else ends it."""

    claim: Claim | None = None  # the VM whose end it waits for; None: all of them
    end: int | None = None  # instructions, of that VM or of all
    until: Callable[[], bool] | None = None
    deadline: int = NEVER  # host time


class Chore:
    """What a host does at regular times, between two turns."""

    def __init__(self, ns: int, now: int, action: Callable[[], None]) -> None:
        self.ns, self.due, self.action = ns, (now // ns + 1) * ns, action

    def look(self, now: int) -> None:
        """If it is due: once, however late it is."""
        if self.due <= now:
            self.due = (now // self.ns + 1) * self.ns
            self.action()


class Schedule(House):
    """Who runs where."""

    def __init__(self, processors: Sequence[Processor], policy: Policy, *, is_wall: bool) -> None:
        super().__init__(processors, policy, is_wall=is_wall)
        self.ended: Callable[[Claim], None] = lambda claim: None
        self.asked: Stop | None = None  # to end the run
        self._due: list[tuple[int, int, Seat | Claim]] = []
        self._order = count()
        self._last = 0  # in real time
        self._chores: list[Chore] = []

    def every(self, ns: int, action: Callable[[], None]) -> None:
        """Have this done at all multiples of so many ns of host time, while a VM runs."""
        self._chores.append(Chore(ns, self.time.now(), action))

    def ask(self, stop: Stop) -> None:
        """From any thread: end the run soon."""
        self.asked = stop
        self.news.ring()

    def held(self) -> AbstractContextManager[None]:
        """Inside, nobody answers an exit of any VM."""
        return nullcontext()

    def still(self, *claims: Claim) -> AbstractContextManager[None]:
        """Inside, nobody executes anything of these VMs; none named: of any."""
        return nullcontext()

    # --- what is due ---

    def _note(self, when: int, what: Seat | Claim) -> None:
        if when < FAR:
            shift = self.claims[0].seats[0].vcpu.time.shift if self.claims else 0
            host = -(-when >> shift << shift)
            heapq.heappush(self._due, (host, next(self._order), what))

    def note_timer(self, seat: Seat) -> None:
        """It sleeps: look at it when its own timer is due."""
        due = seat.vcpu.apic.deadline()
        self._note(NEVER if due == NEVER else due - seat.claim.clock.offset, seat)

    def _look(self, now: int) -> None:
        """All that has happened meanwhile."""
        if self._chores:
            self._do_chores(now)
        while self._restless or self.poked or (self._due and self._due[0][0] <= now):
            while self._restless:
                self._note_board(self._restless.pop())
            while self._due and self._due[0][0] <= now:
                due, _, what = heapq.heappop(self._due)
                if isinstance(what, Claim):
                    self._fire(what)
                else:
                    self._wake(what, now, due)
            while self.poked:
                self._wake(self.poked.popleft(), now)

    def _do_chores(self, now: int) -> None:
        for chore in self._chores:
            chore.look(now)

    def _note_board(self, claim: Claim) -> None:
        due = claim.clock.next_deadline()
        if due is not None and claim in self.claims:
            self._note(due - claim.clock.offset, claim)

    def _fire(self, claim: Claim) -> None:
        """The timers of a VM's board, whoever of its vCPUs would see them."""
        if claim not in self.claims or claim.ended is not None:
            return
        try:
            claim.clock.run_due()
        except OutOfFrames as problem:
            self._over(claim, Stop(StopKind.ERROR, str(problem)))
        self._restless.add(claim)
        self.poked.extend(claim.seats)

    # --- running ---

    def run(self, aim: Aim) -> Stop:
        """Until the aim is reached, the VM of the aim ends, or all have."""
        hold_signals()
        self.is_fresh = False
        if aim.claim is not None and aim.claim.ended is not None:
            self.resume(aim.claim)
        while True:
            stop = self._step(aim)
            if stop is not None:
                return stop

    def _step(self, aim: Aim) -> Stop | None:
        if self.asked is not None:
            stop, self.asked = self.asked, None
            return stop
        if self.turn is None:
            ended = self._begin(aim)
            if ended is not None or self.turn is None:
                return ended
        pcpu, seat, end = self.turn
        limit = min(end, aim.deadline)
        seat.vcpu.time.limit = limit + seat.claim.clock.offset
        found = seat.vcpu.run(self._goal(aim, seat))
        now = self.time.now()
        return self._answer(aim, pcpu, seat, found, end, now) or self._over_time(aim, now)

    def _answer(
        self, aim: Aim, pcpu: Pcpu, seat: Seat, found: Stop | Verdict, end: int, now: int
    ) -> Stop | None:
        """What comes of a turn, or a part of one, that was to go on until `end`."""
        if isinstance(found, Stop):
            return found if found.kind in PASSING else self._finish(aim, seat.claim, found)
        if pcpu.seat is not seat:  # a callback has sent it away
            return None
        if found is ASLEEP:
            self._sleep(pcpu, seat, now)
            return self._stuck(aim, seat.claim)
        if found is YIELDS:
            self._give_way(pcpu, seat, now)
        elif now >= end:
            self.turn = None
            self._tick(pcpu, seat, now if self.is_wall else now // TURN_NS * TURN_NS, now)
        return None

    def _tick(self, pcpu: Pcpu, seat: Seat, at: int, now: int) -> None:
        """At the boundary of a turn, `at`: whether the one that runs there is to give way."""
        reason, pcpu.preempted = "preempt" if pcpu.preempted else "slice", False
        if self.pools[seat.claim.pool].policy.tick(pcpu, seat, at, reason == "preempt"):
            self._free(pcpu, reason, now)
            self._want(seat, now)

    def _give_way(self, pcpu: Pcpu, seat: Seat, now: int) -> None:
        """It spins: the one of its VM that waits longest goes first, if one does."""
        waiting = [one for one in seat.claim.seats if one.state is State.RUNNABLE]
        other = min(waiting, key=lambda one: one.since, default=None)
        if other is None:
            return
        if self.pools[seat.claim.pool].policy.favor(pcpu, seat, other, now):
            self._free(pcpu, "yield", now)
            self._want(seat, now)

    def _over_time(self, aim: Aim, now: int) -> Stop | None:
        if now < aim.deadline:
            return None
        return Stop(StopKind.DEADLINE, f"host time {aim.deadline} ns")

    def _goal(self, aim: Aim, seat: Seat) -> Goal:
        if aim.claim is not None and seat.claim is not aim.claim:
            return Goal()
        if aim.end is None:
            return Goal(None, aim.until)
        taking = [seat.claim] if aim.claim is not None else self.claims
        left = aim.end - sum(claim.retired for claim in taking)
        return Goal(seat.vcpu.retired + left, aim.until)

    def _begin(self, aim: Aim) -> Stop | None:
        """The next turn, or a part of one; time passes if nobody has anything to do."""
        now = self.time.now()
        if (stop := self._over_time(aim, now)) is not None:
            return stop
        self._look(now)
        if all(claim.ended is not None for claim in self.claims):
            return Stop(StopKind.STOPPED, "no VM runs")
        found = self._begin_real(now) if self.is_wall else self._begin_virtual(now)
        if found is None:
            return self._wait(aim, now)
        pcpu, seat, _ = found
        self.time.follow(pcpu.processor)
        if pcpu.seat is None:
            self._put(pcpu, seat, now)
        seat.vcpu.time.armed = 0  # the timer did not see the time of the others
        seat.vcpu.look()
        self.turn = found
        return None

    def _begin_virtual(self, now: int) -> tuple[Pcpu, Seat, int] | None:
        turn = now // TURN_NS
        pcpu = self.pcpus[turn % len(self.pcpus)]
        seat = self._chosen(pcpu, now, turn * TURN_NS)
        return None if seat is None else (pcpu, seat, (turn + 1) * TURN_NS)

    def _chosen(self, pcpu: Pcpu, now: int, at: int) -> Seat | None:
        if pcpu.seat is not None and pcpu.preempted:
            self._tick(pcpu, pcpu.seat, at, now)
        return pcpu.seat or self.pools[pcpu.pool].policy.pick(pcpu, now)

    def _begin_real(self, now: int) -> tuple[Pcpu, Seat, int] | None:
        for n in range(1, len(self.pcpus) + 1):
            pcpu = self.pcpus[(self._last + n) % len(self.pcpus)]
            seat = self._chosen(pcpu, now, now)
            if seat is not None:
                self._last = pcpu.number
                return pcpu, seat, now + WALL_TURN_NS
        return None

    def _wait(self, aim: Aim, now: int) -> Stop | None:
        """This turn, or more, is nobody's."""
        due, chores = self._soonest(aim), self._next_chore()
        if self.is_wall:
            due = min(due, chores)
            self.news.clear()
            if not self.poked and self.asked is None:
                self._nap(None if due == NEVER else (due - now) / 1e9)
            return None
        seats = [seat for claim in self.claims for seat in claim.seats]
        turn = now // TURN_NS
        if any(seat.state in (State.RUNNING, State.RUNNABLE) for seat in seats):
            due = min(due, (turn + 1) * TURN_NS)
        if due == NEVER and not self._listens():
            return self._dead(aim)
        due = min(due, chores)  # that nobody can wake by
        processor = self.pcpus[turn % len(self.pcpus)].processor
        self.time.follow(processor)
        if due > now:
            processor.advance(self._passing(due - now, due))
        return None

    def _nap(self, seconds: float | None) -> None:
        self.news.wait(seconds)

    def _soonest(self, aim: Aim) -> int:
        """When somebody may have something to do, if nothing is told to anybody."""
        due = min((pool.policy.due() for pool in self.pools.values()), default=NEVER)
        return min(due, aim.deadline, self._due[0][0] if self._due else NEVER)

    def _next_chore(self) -> int:
        return min((chore.due for chore in self._chores), default=NEVER)

    def _passing(self, left: int, due: int) -> int:
        """How much of the time in which nobody has anything to do passes: all of it at once.

        If something may come from outside it passes as it does there, until something comes.
        """
        if not self._listens():
            return left
        self.news.clear()
        if self.poked or self.asked is not None:
            return 0
        return passing(self.news, None if due == NEVER else left / 1e9, left)

    def _listens(self) -> bool:
        return any(claim.has_outside and claim.ended is None for claim in self.claims)

    def _dead(self, aim: Aim) -> Stop | None:
        """Nobody runs, and nothing is due."""
        for claim in [one for one in self.claims if one.ended is None]:
            if (stop := self._stuck(aim, claim, is_last=True)) is not None:
                return stop
        return None

    def _sleep(self, pcpu: Pcpu, seat: Seat, now: int) -> None:
        self._stand(seat, State.BLOCKED, "block", now)
        self.note_timer(seat)
        self._restless.add(seat.claim)
        self.poked.append(seat)  # what came before it slept

    def _stuck(self, aim: Aim, claim: Claim, *, is_last: bool = False) -> Stop | None:
        """Whether a VM of which one sleeps now can ever go on.

        `is_last`: nobody is left who could send it something.
        """
        if any(seat.state is not State.BLOCKED or not seat.vcpu.is_idle for seat in claim.seats):
            return None
        if all(seat.vcpu.is_off for seat in claim.seats):
            return self._finish(aim, claim, Stop(StopKind.STUCK, "halted with RFLAGS.IF=0"))
        if self.is_wall or (claim.is_linked and not is_last):
            return None
        if all(seat.vcpu.time.due() == NEVER for seat in claim.seats):
            return self._finish(aim, claim, Stop(StopKind.STUCK, "halted, and no timer is armed"))
        return None

    def _finish(self, aim: Aim, claim: Claim, stop: Stop) -> Stop | None:
        """A VM comes to an end, unless it starts again.  The run's end if it is its aim."""
        for seat in claim.seats:  # who asks for a stop asks all of them
            if seat.vcpu.requested is stop:
                seat.vcpu.requested = None
        if claim is aim.claim:
            if stop.kind not in LIMITS:
                self.end(claim, stop)
            return stop
        answer = claim.finish(stop)
        if answer is None:
            self.end(claim, stop)
            self.resume(claim)
            return None
        self._over(claim, answer)
        if aim.claim is None and all(one.ended is not None for one in self.claims):
            return answer
        return None

    def _over(self, claim: Claim, stop: Stop) -> None:
        self.end(claim, stop)
        self.ended(claim)
