"""What a snapshot keeps of a VM's place in the schedule of its host.

Restored on a host like that (as many pCPUs, the same policy) on which nothing has run yet, the VM
goes on as if it had never been saved, to the last instruction.  On any other it begins anew.

Source: ours.  Invariants: what is read is checked, it is a hostile file; times are host time.
"""

from dataclasses import dataclass, field
from typing import Any

from understudy.sched.policy import Policy
from understudy.sched.schedule import Schedule
from understudy.sched.seat import Claim, Seat, SeatCounts, State, portion
from understudy.state import U64, plain, restore


@dataclass
class SeatState:
    """One vCPU."""

    state: str
    since: U64
    woken_at: U64 | None
    pcpu: U64 | None
    is_there: bool  # its registers are on that pCPU
    reason: str  # why it left, if it did
    preempted: bool
    turn_end: U64 | None  # of the turn that the end of the run has cut
    counts: SeatCounts
    policy: dict[str, int] = field(default_factory=dict)


@dataclass
class ClaimState:
    """One VM."""

    policy: str
    pcpus: U64
    now: U64
    weight: U64  # in thousandths
    cap: U64 | None
    poked: list[U64]
    seats: list[SeatState]


def save(schedule: Schedule, claim: Claim) -> dict[str, Any]:
    """As plain values."""
    schedule.settle()
    policy, now = schedule.pools[claim.pool].policy, schedule.time.now()
    seats = [_of(schedule, policy, seat) for seat in claim.seats]
    cap = None if claim.cap is None else round(claim.cap * 1000)
    state = ClaimState(
        policy.name, len(schedule.pcpus), now, round(claim.weight * 1000), cap,
        [seat.number for seat in schedule.poked if seat.claim is claim], seats,
    )  # fmt: skip
    saved: dict[str, Any] = plain(state)
    return saved


def _of(schedule: Schedule, policy: Policy, seat: Seat) -> SeatState:
    pcpu = None if seat.pcpu is None else schedule.pcpus[seat.pcpu]
    is_there = pcpu is not None and pcpu.there is seat
    turn = schedule.turn
    return SeatState(
        str(seat.state), seat.since, seat.woken_at, seat.pcpu, is_there,
        pcpu.reason if pcpu is not None and is_there else "",
        pcpu is not None and pcpu.seat is seat and pcpu.preempted,
        turn[2] if turn is not None and turn[1] is seat else None,
        seat.counts, policy.save(seat),
    )  # fmt: skip


def load(schedule: Schedule, claim: Claim, saved: dict[str, Any]) -> None:
    """Become what was saved, as far as this host is like that one.  ValueError if it is none."""
    if not saved:  # it had processors of its own
        return
    state = restore(ClaimState, saved, "place")
    claim.weight = portion(state.weight / 1000, "snapshot: weight")
    claim.cap = None if state.cap is None else portion(state.cap / 1000, "snapshot: cap")
    policy = schedule.pools[claim.pool].policy
    if len(state.seats) != len(claim.seats):
        raise ValueError(f"snapshot: {len(state.seats)} seats, expected {len(claim.seats)}")
    is_alike = (policy.name, len(schedule.pcpus)) == (state.policy, state.pcpus)
    if not (policy.keeps and is_alike and schedule.is_fresh and schedule.time.now() == state.now):
        return
    schedule.forget_pokes(claim, state.poked)
    for seat, its in zip(claim.seats, state.seats, strict=True):
        _become(schedule, policy, seat, its)


def _become(schedule: Schedule, policy: Policy, seat: Seat, its: SeatState) -> None:
    seat.state, seat.since, seat.woken_at = State(its.state), its.since, its.woken_at
    seat.pcpu, seat.counts, seat.counted = its.pcpu, its.counts, schedule.time.now()
    if seat.pcpu is not None and seat.pcpu >= len(schedule.pcpus):
        raise ValueError(f"snapshot: pCPU {seat.pcpu}, expected below {len(schedule.pcpus)}")
    is_running = seat.state is State.RUNNING
    if its.is_there or is_running:
        pcpu = schedule.pcpus[seat.pcpu or 0]
        seat.pcpu = pcpu.number
        if pcpu.there is not None:
            raise ValueError(f"snapshot: two vCPUs on {pcpu!r}")
        seat.vcpu.guest.place(pcpu.processor)
        pcpu.there, pcpu.reason = seat, its.reason or pcpu.reason
        if is_running:
            pcpu.seat, pcpu.preempted = seat, its.preempted
        if is_running and its.turn_end is not None:
            schedule.time.follow(pcpu.processor)
            schedule.turn = pcpu, seat, its.turn_end
    if seat.state is State.BLOCKED:
        schedule.note_timer(seat)
    policy.load(seat, its.policy)
