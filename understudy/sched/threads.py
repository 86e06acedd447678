"""A host's processors in real time, each in a thread of its own.

A thread does for its pCPU what `Schedule` does for all in turns: it looks who goes on there, puts
it there, runs it for a turn, and hears from it.  One lock is for the whole host (`Rendezvous`, one
for each VM, with that lock): who executes Python code has it, so policies, devices and queues are
as sequential as in turns; what runs at once are guests.

What concerns more than one pCPU is done when all have come to the end of their turns (at rest): a
VM ends or starts again, a host's chores.  Who is where (pools, policies, who takes part) can be
changed at any time by whoever has the lock; then nobody is chosen before all have come to rest.

VMs whose processors take turns (several under shadow paging, or interpreted; decision 0064) keep
the lock while they are in the guest.  By turns, on the caller's thread, go runs with a budget of
instructions.

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: after a run no thread of it is left; a vCPU is executed by one thread at a time; a VM
ends while none of its processors executes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Final

from understudy.bell import Bell
from understudy.rendezvous import FairLock, Rendezvous, together
from understudy.sched.house import DEFAULT
from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import NEVER, Policy, PolicyError
from understudy.sched.schedule import Aim, Schedule
from understudy.sched.seat import Claim, Seat, State
from understudy.silicon import Processor, hold_signals
from understudy.turns import WALL_TURN_NS
from understudy.vcpu.activity import Entry
from understudy.verdict import YIELDS, Stop, StopKind

LONG_TURN_NS: Final = 1_000_000  # nobody waits for it to end: who is to give way is brought out


class Threads(Schedule):
    """Who runs where, on a host of several pCPUs."""

    def __init__(self, processors: Sequence[Processor], policy: Policy) -> None:
        super().__init__(processors, policy, is_wall=True)
        self.lock = FairLock()
        self.meetings: dict[Claim, Rendezvous] = {}
        self._rests: deque[Callable[[], None]] = deque()  # to be done when all are at rest
        self._aim = Aim()
        self._stop: Stop | None = None
        self._problem: BaseException | None = None
        self._is_over = self._is_alone = True  # the run; there are no threads

    # --- who takes part ---

    def admit(self, claim: Claim, pool: str = DEFAULT) -> None:
        self.meetings[claim] = Rendezvous([seat.vcpu for seat in claim.seats], self.lock)
        try:
            super().admit(claim, pool)
        except PolicyError:
            del self.meetings[claim]
            raise

    def dismiss(self, claim: Claim) -> None:
        super().dismiss(claim)
        self.meetings.pop(claim).close()

    @contextmanager
    def changing(self) -> Iterator[None]:
        with self.lock.held():
            try:
                yield
            finally:  # who was refused may have left a pCPU, and come back
                if not self._is_alone:
                    self._at_rest(_look_again)

    def held(self) -> AbstractContextManager[None]:
        return self.lock.held()

    @contextmanager
    def still(self, *claims: Claim) -> Iterator[None]:
        with self.lock.held():
            for claim in claims or self.claims:
                self.meetings[claim].halt()
            yield
            for pcpu in self.pcpus:
                seat = pcpu.inside
                if seat is not None and seat.vcpu.entry is not self._entry(seat):
                    self._bring_back(pcpu)  # its technique is another now

    # --- from any thread ---

    def ask(self, stop: Stop) -> None:
        super().ask(stop)
        self._call_all()

    def hear(self, seat: Seat) -> None:
        super().hear(seat)
        if self._is_over or seat.state is not State.BLOCKED:
            return
        if any(pcpu.inside is seat for pcpu in self.pcpus):
            return
        pcpus = self.pools[seat.claim.pool].pcpus
        pcpus = [one for one in pcpus if one.number == seat.pcpu] + pcpus
        for pcpu in pcpus:
            if pcpu.inside is None:  # its thread waits, or is about to look who goes on
                pcpu.bell.ring()
                return
        for pcpu in pcpus[:1]:
            self._bring_back(pcpu)

    def _call_all(self) -> None:
        for pcpu in self.pcpus:
            self._bring_back(pcpu)
            pcpu.bell.ring()

    def _bring_back(self, pcpu: Pcpu) -> None:
        """The turn there is over now."""
        seat = pcpu.inside
        if seat is not None:
            seat.vcpu.time.limit = 0
            seat.vcpu.look_now()

    def _end(self, stop: Stop | None = None) -> None:
        self._stop, self._is_over = self._stop or stop, True
        self._call_all()

    # --- a run ---

    def run(self, aim: Aim) -> Stop:
        if aim.end is not None:
            with self.lock.held():
                return super().run(aim)
        self.is_fresh = False
        if aim.claim is not None and aim.claim.ended is not None:
            self.resume(aim.claim)
        self._aim, self._stop, self._problem = aim, None, None
        self._is_over = self._is_alone = False
        try:
            together([(f"pCPU {one.number}", partial(self._work, one)) for one in self.pcpus],
                     self._end)  # fmt: skip
        finally:
            self._is_over = self._is_alone = True
            for claim in self.claims:
                for seat in claim.seats:
                    self._go_by(seat, seat.vcpu.guest)
            self._rest()
        if self._problem is not None:
            raise self._problem
        assert self._stop is not None
        return self._stop

    def _work(self, pcpu: Pcpu) -> None:
        hold_signals()
        self.lock.acquire()
        try:
            while not self._is_over:
                self._go_on(pcpu)
        except BaseException as problem:
            self._problem = self._problem or problem
            self._end()
        finally:
            self.lock.release()

    def _go_on(self, pcpu: Pcpu) -> None:
        """One turn, or what is to be done before there can be one."""
        aim, now, stop = self._aim, self.time.now(), self.asked
        if stop is not None:  # first: nobody sleeps while it is not heard
            self.asked = None
        elif self._rests:
            if self._executes():
                self._sleep_until(pcpu, NEVER, lambda: not self._rests)
            else:
                self._rest()
            return
        elif (stop := self._over_time(aim, now)) is None:
            self._look(now)
            if all(claim.ended is not None for claim in self.claims):
                stop = Stop(StopKind.STOPPED, "no VM runs")
        if stop is not None:
            self._end(stop)
        elif self._rests:
            return
        elif (seat := self._chosen(pcpu, now, now)) is not None:
            self._turn(pcpu, seat, now)
        else:
            due = min(self._soonest(aim), self._next_chore())
            self._sleep_until(pcpu, due, lambda: bool(self.poked or self._rests))

    def _turn(self, pcpu: Pcpu, seat: Seat, now: int) -> None:
        if pcpu.seat is None:
            self._put(pcpu, seat, now)
        vcpu, entry = seat.vcpu, self._entry(seat)
        self._go_by(seat, entry)
        keeps_lock = entry is vcpu.guest
        if not pcpu.end:
            pcpu.end = now + (WALL_TURN_NS if keeps_lock else LONG_TURN_NS)
        end = pcpu.end
        vcpu.time.armed = 0
        vcpu.look()
        pcpu.inside = seat
        due = self._due[0][0] if self._due else NEVER
        vcpu.time.limit = min(end, due, self._aim.deadline) + seat.claim.clock.offset
        try:
            if self._is_over or self.asked is not None:  # since it was looked at
                return
            found = vcpu.run(self._goal(self._aim, seat))
        finally:
            pcpu.inside = None
        if (stop := self._answer(self._aim, pcpu, seat, found, end, self.time.now())) is not None:
            self._end(stop)
        if keeps_lock or found is YIELDS:
            self.lock.let_by()

    def _tick(self, pcpu: Pcpu, seat: Seat, at: int, now: int) -> None:
        pcpu.end = 0  # whatever cut it before (a timer, a vCPU that spins), this was its end
        super()._tick(pcpu, seat, at, now)

    def _entry(self, seat: Seat) -> Entry:
        """Its way into the guest: by a door, if others may go on meanwhile."""
        guest = seat.vcpu.guest
        takes_turns = seat.vcpu.view.takes_turns and len(seat.claim.seats) > 1
        if guest.takes_turns or takes_turns:
            return guest
        return self.meetings[seat.claim].doors[seat.number]

    def _go_by(self, seat: Seat, entry: Entry) -> None:
        vcpu = seat.vcpu
        if vcpu.entry is not entry:
            table = vcpu.guest.table
            if entry is not vcpu.guest:
                table = self.meetings[seat.claim].doors[seat.number].table()
            vcpu.entry, vcpu.table = entry, table

    def _sleep_until(self, pcpu: Pcpu, due: int, has_news: Callable[[], bool]) -> None:
        """Until host time `due`, or until its bell is rung."""
        pcpu.bell.clear()
        if self._is_over or self.asked is not None or has_news():
            return
        left = None if due == NEVER else max(due - self.time.now(), 0) / 1e9
        self._wait_for(pcpu.bell, left)

    def _wait_for(self, bell: Bell, seconds: float | None) -> None:
        self.lock.release()
        try:
            bell.wait(seconds)
        finally:
            self.lock.acquire()

    # --- by turns ---

    def _step(self, aim: Aim) -> Stop | None:
        stop = super()._step(aim)
        self.lock.let_by()
        return stop

    def _nap(self, seconds: float | None) -> None:
        self._wait_for(self.news, seconds)

    # --- at rest ---

    def _at_rest(self, action: Callable[[], None]) -> None:
        """Do it when all are at the end of their turns, and let nobody go on before."""
        self._rests.append(action)
        self._call_all()

    def _executes(self) -> bool:
        """Anybody, in a thread."""
        return any(pcpu.inside is not None for pcpu in self.pcpus)

    def _rest(self) -> None:
        try:
            while self._rests:
                self._rests.popleft()()
        finally:
            for pcpu in self.pcpus:
                pcpu.bell.ring()

    def _do_chores(self, now: int) -> None:
        if self._is_alone:
            super()._do_chores(now)
        elif self._next_chore() <= now:
            self._at_rest(partial(super()._do_chores, now))

    def _finish(self, aim: Aim, claim: Claim, stop: Stop) -> Stop | None:
        if self._is_alone:
            return super()._finish(aim, claim, stop)
        self._at_rest(partial(self._finished, claim, stop))
        return None

    def _finished(self, claim: Claim, stop: Stop) -> None:
        aim = self._aim
        if claim.ended is not None or claim not in self.claims or stop is self._stop:
            return  # another of its vCPUs was first
        if claim is aim.claim and self._is_over:  # the next run says so
            claim.seats[0].vcpu.request(stop)
        elif (found := super()._finish(aim, claim, stop)) is not None:
            self._end(found)

    def _over(self, claim: Claim, stop: Stop) -> None:
        if self._executes():
            self._at_rest(partial(self._over, claim, stop))
        elif claim.ended is None and claim in self.claims:
            super()._over(claim, stop)

    # --- what idle pCPUs hear ---

    def _want(self, seat: Seat, now: int) -> None:
        super()._want(seat, now)
        for pcpu in self.pools[seat.claim.pool].pcpus:
            if pcpu.seat is None:
                pcpu.bell.ring()

    def _preempt(self, pcpu: Pcpu) -> None:
        super()._preempt(pcpu)
        self._bring_back(pcpu)


def _look_again() -> None:
    """Something is different: who goes on is looked at again."""


def schedule_of(processors: Sequence[Processor], policy: Policy, *, is_wall: bool) -> Schedule:
    """Who decides for these: with a thread for each, in real time, if there are several."""
    if is_wall and len(processors) > 1:
        return Threads(processors, policy)
    return Schedule(processors, policy, is_wall=is_wall)
