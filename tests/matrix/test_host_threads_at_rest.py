"""What concerns all pCPUs of a host is done when none of their threads executes."""

from functools import partial
from threading import Thread, get_ident
from time import sleep
from typing import Any

import pytest

from tests.matrix.shared import spinning
from understudy.host import Host
from understudy.machine.frames import OutOfFrames
from understudy.sched.threads import LONG_TURN_NS, Threads
from understudy.vcpu.activity import Goal
from understudy.verdict import OVER, YIELDS, Stop, StopKind, Verdict

SLEEP = """
    b0 ff | mov al, 0ffh
    e6 21 | out 21h, al: no interrupts of the 8259
    fb    | sti
    f4    | hlt
    eb fd | jmp short -3
"""


def test_a_vm_whose_board_finds_no_frame_ends_when_nobody_executes() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        schedule, vm, other = host.schedule, spinning(host, "vm"), spinning(host, "other")
        assert isinstance(schedule, Threads)
        ended: list[str] = []

        def fail() -> None:
            raise OutOfFrames("none is left")

        host.on_end.append(lambda vm, stop: ended.append(stop.detail))
        with schedule.held():
            schedule.pcpus[1].inside = other.claim.seats[0]
            vm.clock.at(vm.clock.now(), fail)
            schedule._look(schedule.time.now())
            assert (vm.ended, ended) == (None, [])
            schedule.pcpus[1].inside = None
            schedule._rest()
        assert vm.ended is not None and ended == ["none is left"]


def test_weights_and_caps_change_when_nobody_decides() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        schedule, vm = host.schedule, spinning(host, "vm")
        assert isinstance(schedule, Threads)

        def change() -> None:
            vm.weight, vm.cap = 3, 0.5

        thread = Thread(target=change)
        with vm.turns.held():
            thread.start()
            while thread.is_alive() and not schedule.lock._queue:
                sleep(0.01)
            assert (vm.weight, vm.cap) == (1, None)
        thread.join()
        assert (vm.weight, vm.cap) == (3, 0.5)


@pytest.mark.parametrize("found", [YIELDS, OVER])
def test_a_turn_that_is_cut_comes_to_its_end(
    found: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a vCPU that spins, and finds nobody of its VM who waits, or by timers of other VMs."""
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vm, schedule = spinning(host, "spin"), host.schedule
        vcpu = vm.vcpus[0]
        assert isinstance(schedule, Threads)
        now, ticks = schedule.time.now(), list[int]()

        def run(goal: Goal) -> Verdict:
            nonlocal now
            if vcpu.time.limit <= now + vm.clock.offset:
                return OVER
            now += LONG_TURN_NS // 4
            return found

        def tick(*event: Any) -> bool:
            ticks.append(now)
            return False

        monkeypatch.setattr(schedule.time, "now", lambda: now)
        monkeypatch.setattr(schedule.pools["default"].policy, "tick", tick)
        monkeypatch.setattr(schedule, "_is_over", False)
        monkeypatch.setattr(vcpu, "run", run)
        began = now
        with schedule.held():
            for _ in range(50):
                schedule._go_on(schedule.pcpus[0])
        monkeypatch.undo()
        assert [tick - began for tick in ticks[:8]] == [n * LONG_TURN_NS for n in range(1, 9)]


def test_others_get_the_lock_while_a_run_of_so_many_instructions_sleeps() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vm = spinning(host, "vm", SLEEP)
        looked: list[int] = []

        def look() -> None:
            with vm.turns.held():
                looked.append(vm.instructions)
            vm.post(partial(vm.endings.request, Stop(StopKind.STOPPED, "seen")))

        thread = Thread(target=look)
        thread.start()
        stop = vm.go(budget=1_000_000)
        thread.join()
        assert looked and stop.detail == "seen"


def test_who_closes_a_vm_finds_nobody_who_goes_on_with_it() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vm, schedule, owners = spinning(host, "vm"), host.schedule, list[int]()
        assert isinstance(schedule, Threads)
        dismiss = schedule.dismiss

        def noting(claim: Any) -> None:
            owners.append(schedule.lock.owner)
            dismiss(claim)

        schedule.dismiss = noting  # type: ignore[method-assign]
        vm.close()
        assert owners == [get_ident()]
