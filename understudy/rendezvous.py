"""Where the vCPUs of one VM meet that run in threads: one lock, and doors into the guest.

Who executes Python code of the VM holds the lock, which VMs that share a host's processors have
together; it is given up only on the way into the guest and while a vCPU sleeps.  So devices, p2m
and tables are as sequential as in turns.  Who is going to touch what a processor in the guest uses
(its registers, its tables, frames) first brings all others out (`Rendezvous.halt`): they stand
before the lock, and each may have an exit that is not answered.  Such an exit is older than what
changes now; what it says of memory may be wrong by then, so it is put off: the guest tries again.

Source: ours; the names are those of "rendezvous" interrupts, which bring processors together.
Invariants: whoever waits for the lock gets it before anybody gets it twice; what a holder sees
outside the guest stays outside until it gives up the lock.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident

from understudy.bell import Bell
from understudy.silicon import Exit
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop, Verdict

Handler = Callable[[Vcpu, Exit], Verdict | Stop]


class FairLock:
    """A lock that is handed over in the order in which it was asked for."""

    def __init__(self) -> None:
        self.owner = 0  # the thread that has it
        self._gate = threading.Lock()
        self._queue: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        """Wait for it."""
        if self._queue or not self._gate.acquire(blocking=False):
            mine = threading.Lock()
            mine.acquire()
            self._queue.append(mine)
            try:
                if self._gate.acquire(blocking=False):  # it was given up meanwhile: to the first
                    self._hand_over()
                mine.acquire()
            except BaseException:  # a signal's: it waits no more
                self._let_pass(mine)
                raise
        self.owner = get_ident()

    def _hand_over(self) -> bool:
        """To the first that waits, if one does."""
        try:
            self._queue.popleft().release()
        except IndexError:
            return False
        return True

    def _let_pass(self, mine: threading.Lock) -> None:
        try:
            self._queue.remove(mine)
        except ValueError:  # it has been handed over
            self.release()

    def release(self) -> None:
        """Give it to the first that waits."""
        self.owner = 0
        while not self._hand_over():
            self._gate.release()
            if not self._queue or not self._gate.acquire(blocking=False):
                return

    def let_by(self) -> None:
        """Let those who wait for it have it first."""
        self.release()
        self.acquire()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, this thread has it, if it has it already or not."""
        if self.owner == get_ident():
            yield
            return
        self.acquire()
        try:
            yield
        finally:
            self.release()


class Door:
    """The way of one vCPU into the guest and back, in place of its `Guest`'s own."""

    def __init__(self, house: "Rendezvous", vcpu: Vcpu) -> None:
        self.house, self.vcpu = house, vcpu
        self.is_in = False  # between the lock and the lock
        self.sleeps = False
        self.seen = 0  # of `Rendezvous.changes`, when it went in last
        self._exit: Exit | None = None  # that waits for the lock
        self._retired = 0

    def resume(self, budget: int) -> Exit:
        """As `Guest.resume`."""
        return self._pass(self.vcpu.guest.resume, budget)

    def run(self, budget: int) -> Exit:
        """As `Guest.run`."""
        return self._pass(self.vcpu.guest.run, budget)

    def _pass(self, enter: Callable[[int], Exit], budget: int) -> Exit:
        house, vcpu = self.house, self.vcpu
        self._retired = vcpu.guest.count_retired()
        self.seen, self.is_in = house.changes, True
        if vcpu.attention:  # since it was looked at, by somebody who saw no need for a kick
            vcpu.guest.pay()
            vcpu.guest.kick()
        house.lock.release()
        try:
            exit = self._exit = enter(budget)
        finally:
            self.is_in = False
            if house.waits:
                house.came_out.ring()
            house.lock.acquire()
            self._exit = None
        return exit

    @property
    def retired(self) -> int:
        """As `Guest.retired`; while it is in the guest, as of when it went in."""
        return self._retired if self.is_in else self.vcpu.guest.retired

    @property
    def is_late(self) -> bool:
        """Something has changed since it went in."""
        return self.seen != self.house.changes

    def put_off(self) -> None:
        """What an exit that waits for the lock has interrupted goes in with the next entry."""
        exit, guest = self._exit, self.vcpu.guest
        if exit is not None and exit.reason in guest.put_off:
            guest.put_off[exit.reason](self.vcpu, exit)

    def table(self) -> dict[int, Handler]:
        """What answers exits: those that say something of memory are put off if they are late."""
        guest = self.vcpu.guest
        late = {
            reason: self._unless_late(guest.table[reason], again)
            for reason, again in guest.put_off.items()
        }
        return guest.table | late

    def _unless_late(self, handler: Handler, again: Handler) -> Handler:
        def answer(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
            return (again if self.is_late else handler)(vcpu, exit)

        return answer


class Rendezvous:
    """The lock of one VM, and who is in the guest."""

    def __init__(self, vcpus: Sequence[Vcpu], lock: FairLock) -> None:
        """Who looks into one of them, or changes the memory's map, has the others outside."""
        self.lock = lock
        self.doors = [Door(self, vcpu) for vcpu in vcpus]
        self.changes = 0  # times that all stood outside so that something could be changed
        self.waits = False  # somebody waits for one that is in the guest
        self.came_out = Bell()
        for vcpu in vcpus:
            vcpu.halt = vcpu.memory.p2m.halt = self.halt

    def close(self) -> None:
        """The VM is no more."""
        self.doors.clear()

    def halt(self) -> None:
        """Bring all others out of the guest; they stay outside while the lock is held."""
        self._bring_out()
        for door in self.doors:
            door.put_off()

    def _bring_out(self) -> None:
        self.changes += 1
        me = get_ident()
        for door in self.doors:
            if door.vcpu.guest.thread == me:  # what it has, it has looked at already
                door.seen = self.changes
        inside = [door for door in self.doors if door.is_in]
        if not inside:
            return
        for door in inside:
            door.vcpu.guest.kick()
        self.waits = True
        try:
            for door in inside:
                while door.is_in:
                    self.came_out.clear()
                    if door.is_in:
                        self.came_out.wait()
        finally:
            self.waits = False

    @contextmanager
    def still(self) -> Iterator[None]:
        """From any thread: inside, nobody executes anything of the VM, and all can be looked at."""
        with self.lock.held():
            self.halt()
            yield


def together(works: Sequence[tuple[str, Callable[[], None]]], end: Callable[[], None]) -> None:
    """Have each done by a thread of this name, until all are done; this thread only waits.

    `end`: have all come back soon.  It is called if something is raised here meanwhile, by a
    signal, which goes on when the last thread is gone.
    """
    threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in works]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        end()
        raise
    finally:
        for thread in threads:
            _gone(thread)


def _gone(thread: threading.Thread) -> None:
    """Wait for a thread that is on its way out, whatever comes meanwhile."""
    problem: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as late:
            problem = late
    if problem is not None:
        raise problem
