"""The run loop: budgets, time, sleep, and wishes of other threads."""

import threading

import pytest

from tests.unit.fakes import NEVER, FakeExit, FakeProcessor
from tests.unit.fixtures import Bench, bench
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.vcpu.activity import Activity
from understudy.verdict import Stop, StopKind

CPUID = FakeExit(Reason.CPUID, length=2)
HLT = FakeExit(Reason.HLT, length=1)
BUDGET = FakeExit(Reason.BUDGET)
TIMER = FakeExit(Reason.PREEMPTION_TIMER)
RATE = 32  # ticks a unit of the preemption timer, in the fake


def timer(b: Bench) -> int:
    return b.field(Vmcs.PREEMPTION_TIMER_VALUE)


def test_the_first_entry_is_a_launch_and_a_budget_goes_on_inside() -> None:
    with bench() as b:
        b.processor.script.extend([CPUID, BUDGET, CPUID, BUDGET])
        assert b.vm.go(budget=100).kind == StopKind.BUDGET
        assert b.vm.go(budget=100).kind == StopKind.BUDGET
        assert b.processor.calls[-4:] == ["vmlaunch", "vmresume", "run", "vmresume"]


def test_a_failed_launch_is_launched_again() -> None:
    with bench() as b:
        failed = FakeExit(Reason.INVALID_GUEST_STATE, entry_failure=True)
        b.processor.script.extend([failed, CPUID, BUDGET])
        assert b.vm.go().kind == StopKind.ERROR
        b.vm.go()
        assert b.processor.calls[-3:] == ["vmlaunch", "vmlaunch", "vmresume"]


def test_an_exhausted_budget_enters_no_more() -> None:
    with bench() as b:
        b.processor.script.extend([CPUID] * 5)
        assert b.vm.go(budget=3) == Stop(StopKind.BUDGET)
        assert b.processor.entries == 3
        assert b.vm.go(budget=0) == Stop(StopKind.BUDGET)
        assert b.processor.entries == 3


def test_until_is_asked_after_each_exit() -> None:
    with bench() as b:
        b.processor.script.extend([CPUID] * 5)
        assert b.vm.go(until=lambda: b.processor.entries == 2).kind == StopKind.UNTIL
        assert b.vm.go(until=lambda: True).kind == StopKind.UNTIL
        assert b.processor.entries == 2


def test_the_timer_holds_the_nearest_deadline_never_early() -> None:
    with bench() as b:
        clock = b.vm.clock
        clock.at(1000, lambda: None)
        b.apic.timer = 650
        b.play()
        assert timer(b) == -(-650 // RATE)
        b.apic.timer = NEVER
        b.vm.vcpus[0].look()
        b.play()
        now = clock.now() - 1  # the last entry took a tick
        assert timer(b) == -(-1000 // RATE) - now // RATE


def test_the_timer_is_written_only_when_the_deadline_changes() -> None:
    with bench() as b:
        b.vm.clock.at(1000, lambda: None)
        b.play(CPUID)
        b.processor.written.clear()
        b.vm.vcpus[0].look()
        b.play(CPUID)
        assert Vmcs.PREEMPTION_TIMER_VALUE not in b.processor.written
        b.vm.clock.at(500, lambda: None)  # arming one makes the loop look by itself
        b.play(CPUID)
        assert Vmcs.PREEMPTION_TIMER_VALUE in b.processor.written


def test_a_deadline_too_far_for_the_counter_is_counted_in_parts() -> None:
    with bench() as b:
        b.play()
        assert timer(b) == 0xFFFF_FFFF
        b.processor.written.clear()
        b.play(TIMER)
        assert Vmcs.PREEMPTION_TIMER_VALUE in b.processor.written


def test_device_timers_and_the_apics_fire_when_due() -> None:
    with bench() as b:
        fired: list[int] = []
        b.vm.clock.at(320, lambda: fired.append(b.vm.clock.now()))
        b.apic.timer = 640

        def at(tsc: int) -> FakeExit:
            b.processor.tsc = tsc - 1
            return TIMER

        b.play(lambda p: at(319))
        assert fired == []
        b.play(lambda p: at(321))
        assert fired == [321]
        assert b.apic.ticked == []
        b.play(lambda p: at(641))
        assert b.apic.ticked == [641]
        assert b.injected == 1 << 31 | 0xEC


def test_a_kick_makes_nothing_happen_earlier() -> None:
    """Deadline 330 is due when the timer can say so, at 352; a kick at 340 must change nothing."""
    with bench() as b:
        fired: list[int] = []
        b.vm.clock.at(330, lambda: fired.append(1))

        def kicked(processor: FakeProcessor) -> FakeExit:
            processor.tsc = 339
            return FakeExit(Reason.EXTERNAL_INTERRUPT)

        b.play(kicked)
        assert fired == []
        assert b.vm.counts()["exits"] == {}
        assert b.vm.counts()["kicks"] == 1


def test_sleep_skips_virtual_time_to_the_next_event() -> None:
    with bench() as b:
        b.apic.timer = 5_000_000
        b.play(HLT)
        assert b.apic.ticked == [5_000_000]
        assert b.injected == 1 << 31 | 0xEC
        assert b.vm.vcpus[0].state.activity == Activity.ACTIVE


def test_sleep_goes_on_through_timers_that_wake_nobody() -> None:
    with bench() as b:
        fired: list[int] = []
        b.vm.clock.at(3200, lambda: fired.append(1))
        b.apic.timer = 6400
        b.play(HLT)
        assert fired == [1]
        assert b.vm.clock.now() > 6400


def test_a_sleep_of_decades_has_no_end() -> None:
    """Time would come to where no number of a snapshot reaches."""
    with bench({"rflags": 0x202}) as b:
        b.apic.timer = (1 << 64) - 2
        b.processor.script.append(HLT)
        stop = b.vm.go()
        assert (stop.kind, b.vm.clock.now() < 1 << 40) == (StopKind.STUCK, True)


@pytest.mark.parametrize(
    ("rflags", "words"), [(0x2, "halted with RFLAGS.IF=0"), (0x202, "no timer is armed")]
)
def test_a_sleep_without_end_is_stuck_and_stays_so(rflags: int, words: str) -> None:
    with bench({"rflags": rflags}) as b:
        b.processor.script.append(HLT)
        for _ in range(2):
            stop = b.vm.go()
            assert stop.kind == StopKind.STUCK
            assert words in stop.detail
        assert b.processor.entries == 1
        b.vm.vcpus[0].events.nmi()
        b.play()
        assert b.injected == 1 << 31 | 2 << 8 | 2


def test_a_deadline_in_guest_time_ends_a_sleep() -> None:
    with bench() as b:
        b.processor.script.append(HLT)
        assert b.vm.go(deadline_ns=10_000).kind == StopKind.DEADLINE
        assert b.vm.clock.now() >= 10_000
        b.apic.irr = {0x33}
        b.play()
        assert b.injected == 1 << 31 | 0x33


def test_wishes_are_done_in_order_between_two_exits() -> None:
    with bench() as b:
        done: list[int] = []
        for n in range(3):
            b.vm.post(lambda n=n: done.append(n))  # type: ignore[misc]
        assert b.processor.kicks == 0  # it does not run
        b.play(CPUID)
        assert done == [0, 1, 2]


def test_a_wish_during_a_run_kicks() -> None:
    with bench() as b:
        done: list[str] = []

        def another_thread(processor: FakeProcessor) -> FakeExit:
            thread = threading.Thread(target=lambda: b.vm.post(lambda: done.append("x")))
            thread.start()
            thread.join()
            assert processor.kicks == 1
            return FakeExit(Reason.EXTERNAL_INTERRUPT)

        b.play(another_thread)
        assert done == ["x"]


def test_a_wish_after_a_budget_leaves_the_guest_first() -> None:
    with bench() as b:
        done: list[str] = []
        b.processor.script.extend([BUDGET, FakeExit(Reason.EXTERNAL_INTERRUPT), BUDGET])
        b.vm.go()
        b.vm.post(lambda: done.append("x"))
        b.vm.go()
        assert b.processor.kicks == 1
        assert done == ["x"]


def test_wall_time_sleeps_until_something_is_posted() -> None:
    with bench(clock="wall") as b:
        b.processor.script.append(HLT)
        timer = threading.Timer(0.05, lambda: b.vm.post(b.vm.vcpus[0].events.nmi))
        timer.start()
        b.play()
        assert b.injected == 1 << 31 | 2 << 8 | 2


def test_wall_limits_end_a_sleep_and_leave_no_trace() -> None:
    with bench(clock="wall") as b:
        b.processor.script.append(HLT)
        assert b.vm.go(wall_seconds=0.02).kind == StopKind.WALL
        assert b.vm.vcpus[0].requested is None
        b.vm.vcpus[0].events.nmi()
        assert b.play().kind == StopKind.BUDGET


def test_an_exception_in_a_device_passes_through_and_the_run_can_go_on() -> None:
    with bench() as b:

        def interrupted(processor: FakeProcessor) -> FakeExit:
            raise KeyboardInterrupt

        b.processor.script.append(interrupted)
        with pytest.raises(KeyboardInterrupt):
            b.vm.go()
        assert not b.vm.vcpus[0].is_running
        assert b.play(CPUID).kind == StopKind.BUDGET
