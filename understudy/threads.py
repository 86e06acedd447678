"""A VM's processors in real time, each in a thread of its own.

The caller's thread waits, so that Ctrl-C and whatever else signals raise meet it where it holds
nothing; it ends the run, and goes on when all threads are gone.  Callbacks (`until`, consoles) are
called by the thread whose exit they follow from, one at a time.

By turns, on the caller's thread, go runs with a budget of instructions, which counts all
processors together, and VMs under shadow paging, or interpreted (`takes_turns` of the view and of
the guest).

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: after a run no thread of it is left; the board's timers are the bootstrap processor's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from os import sched_yield
from typing import Final

from understudy.clock import ManualClock
from understudy.rendezvous import Door, FairLock, Rendezvous, together
from understudy.silicon import hold_signals
from understudy.turns import Turns
from understudy.vcpu.activity import Goal
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import NEVER, GuestClock
from understudy.verdict import ASLEEP, PASSING, YIELDS, Stop, StopKind

Until = Callable[[], bool] | None
NO_BOARD: Final = ManualClock()


class Threads(Turns):
    """Runs the vCPUs of one VM."""

    def __init__(self, vcpus: Sequence[Vcpu], clock: GuestClock) -> None:
        super().__init__(vcpus, clock, is_wall=True)
        self.house = Rendezvous(vcpus, FairLock())
        self._stop: Stop | None = None
        self._problem: BaseException | None = None
        self._is_over = True
        clock.changed.append(self._board_changed)

    def held(self) -> AbstractContextManager[None]:
        """Inside, nobody answers an exit of the VM."""
        return self.house.lock.held()

    @contextmanager
    def still(self) -> Iterator[None]:
        """From any thread: inside, nobody executes anything of the VM."""
        with self.house.still():
            yield
            if not self._is_over and self._must_take_turns:
                self._end(None)  # `run` goes on by turns

    @property
    def _must_take_turns(self) -> bool:
        return any(vcpu.guest.takes_turns or vcpu.view.takes_turns for vcpu in self.vcpus)

    def run(self, end: int | None, until: Until) -> Stop:
        """Until as many instructions have retired in all, `until` says so, or the VM ends."""
        while end is None and not self._must_take_turns:
            if (stop := self._run(until)) is not None:
                return stop
        return super().run(end, until)

    def _run(self, until: Until) -> Stop | None:
        """In threads.  None: by turns from here on."""
        with self._begun():
            works = [
                (f"vCPU {number}", partial(self._work, door, until))
                for number, door in enumerate(self.house.doors)
            ]
            together(works, partial(self._end, None))
        if self._problem is not None:
            raise self._problem
        if self._stop is not None:
            self._told(self._stop)
        return self._stop

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """For one run: exits go through the doors, and one vCPU has the board's timers."""
        self._stop = self._problem = None
        self._is_over = False
        for door in self.house.doors:
            vcpu = door.vcpu
            vcpu.time.limit, vcpu.entry, vcpu.table = NEVER, door, door.table()
            vcpu.time.board = self.clock if vcpu is self.vcpus[0] else NO_BOARD
            vcpu.look()
        try:
            yield
        finally:
            self._is_over = True
            for vcpu in self.vcpus:
                vcpu.time.limit, vcpu.entry, vcpu.table = NEVER, vcpu.guest, vcpu.guest.table
                vcpu.time.board = self.clock
                vcpu.look()

    # --- in the threads ---

    def _work(self, door: Door, until: Until) -> None:
        vcpu, lock, goal = door.vcpu, self.house.lock, Goal(None, until)
        hold_signals()
        lock.acquire()
        try:
            while not self._is_over:
                found = vcpu.run(goal)
                if isinstance(found, Stop):
                    self._found(vcpu, found)
                elif found is ASLEEP:
                    self._sleep(door)
                elif found is YIELDS:
                    lock.release()
                    sched_yield()
                    lock.acquire()
        except BaseException as problem:
            self._problem = self._problem or problem
            self._end(None)
        finally:
            lock.release()

    def _found(self, vcpu: Vcpu, stop: Stop) -> None:
        """One has come to an end.  If another was first, the next run says so."""
        if not self._is_over:
            self._end(stop)
        elif stop.kind not in PASSING and stop is not self._stop:
            vcpu.request(stop)

    def _end(self, stop: Stop | None) -> None:
        """All come back."""
        self._stop, self._is_over = self._stop or stop, True
        for vcpu in self.vcpus:
            vcpu.time.limit = 0
            vcpu.look_now()

    def _sleep(self, door: Door) -> None:
        """Until something comes for it, or is due."""
        vcpu, time, lock = door.vcpu, door.vcpu.time, self.house.lock
        time.wake.clear()
        if not vcpu.is_idle or self._is_over:
            return
        door.sleeps = True
        try:
            if self._is_stuck():
                self._end(Stop(StopKind.STUCK, "halted with RFLAGS.IF=0"))
                return
            deadline = time.next()
            left = None if deadline == NEVER else max(deadline - self.clock.now(), 0) / 1e9
            lock.release()
            try:
                time.wake.wait(left)
            finally:
                lock.acquire()
        finally:
            door.sleeps = False
            vcpu.look()

    def _is_stuck(self) -> bool:
        """All sleep, and nothing can wake any of them."""
        if not all(door.sleeps and door.vcpu.is_idle for door in self.house.doors):
            return False
        return all(vcpu.is_off for vcpu in self.vcpus)

    def _board_changed(self) -> None:
        """A timer of the board was armed, perhaps by another vCPU than the one that has them."""
        if not self._is_over:
            self.vcpus[0].look_now()

    def close(self) -> None:
        self.house.close()

    # --- snapshots ---

    def resume(self, offset: int, now: int) -> None:
        """All processors have the computer's clock."""
        self.clock.offset = now - self.clock.source()
