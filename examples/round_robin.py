"""A scheduling policy of one's own: each vCPU in turn, for a millisecond."""

from collections import deque

from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import Policy
from understudy.sched.seat import Seat

SLICE_NS = 1_000_000


class RoundRobin(Policy, name="round-robin"):
    """One queue for all pCPUs of the pool; who has run, or woken, is the last in it."""

    def __init__(self) -> None:
        self.queue, self.since = deque[Seat](), dict[Seat, int]()

    def wake(self, seat: Seat, now: int) -> None:
        self.queue.append(seat)

    def block(self, seat: Seat, now: int) -> None:
        if seat in self.queue:
            self.queue.remove(seat)

    def tick(self, pcpu: Pcpu, seat: Seat, now: int, asked: bool) -> bool:
        is_over = bool(self.queue) and now - self.since[seat] >= SLICE_NS
        if is_over:
            self.queue.append(seat)
        return is_over

    def pick(self, pcpu: Pcpu, now: int) -> Seat | None:
        if not self.queue:
            return None
        seat = self.queue.popleft()
        self.since[seat] = now
        return seat
