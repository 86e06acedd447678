"""Physical partitioning: each vCPU has a pCPU of its own.

Source: lecture, "Scheduling: Virtual CPUs" ("static and exclusive mapping between a given vCPU and
a given pCPU").
Invariant: no pCPU ever has a second vCPU while the first one is in the pool: no switch, ever.
"""

from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import Policy, PolicyError
from understudy.sched.seat import Seat, State


class Partition(Policy, name="partition"):
    """Whoever comes first has the first pCPU that is free."""

    keeps = True

    def __init__(self) -> None:
        self.owners: dict[int, Seat] = {}  # by pCPU

    def _free(self) -> list[int]:
        return [pcpu.number for pcpu in self.pcpus if pcpu.number not in self.owners]

    def arrive(self, seat: Seat, now: int) -> None:
        free = self._free()
        if not free:
            raise PolicyError(
                f"{seat!r}: policy partition gives each vCPU a pCPU of its own, and the pool has "
                f"{len(self.pcpus)}, all taken"
            )
        self.owners[seat.pcpu if seat.pcpu in free else free[0]] = seat

    def leave(self, seat: Seat, now: int) -> None:
        self.owners = {number: one for number, one in self.owners.items() if one is not seat}

    def wake(self, seat: Seat, now: int) -> Pcpu | None:
        return None

    def block(self, seat: Seat, now: int) -> None:
        pass

    def tick(self, pcpu: Pcpu, seat: Seat, now: int, asked: bool) -> bool:
        return False

    def pick(self, pcpu: Pcpu, now: int) -> Seat | None:
        seat = self.owners.get(pcpu.number)
        return seat if seat is not None and seat.state is State.RUNNABLE else None

    def save(self, seat: Seat) -> dict[str, int]:
        return {"pcpu": next(number for number, one in self.owners.items() if one is seat)}

    def load(self, seat: Seat, saved: dict[str, int]) -> None:
        number = saved["pcpu"]
        if all(pcpu.number != number for pcpu in self.pcpus):
            raise ValueError(f"snapshot: pCPU {number} is not in the pool")
        mine = next(n for n, one in self.owners.items() if one is seat)
        other = self.owners.get(number)
        del self.owners[mine]
        if other is not None and other is not seat:
            self.owners[mine] = other  # which has not been restored yet
        self.owners[number] = seat

    def changed(self, now: int) -> None:
        """A pCPU that has gone leaves its owner to one that is free."""
        gone = self.owners.keys() - {pcpu.number for pcpu in self.pcpus}
        lost = [self.owners[number] for number in sorted(gone)]
        free = self._free()
        if len(lost) > len(free):
            raise PolicyError(
                f"policy partition: the pool would have {len(self.pcpus)} pCPUs "
                f"for {len(self.owners)} vCPUs"
            )
        kept = {number: seat for number, seat in self.owners.items() if number not in gone}
        self.owners = kept | dict(zip(free, lost, strict=False))
