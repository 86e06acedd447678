"""VMs that others can send something hear of it while they sleep.

Source: ours.  Invariant: on a shared host in virtual time that is the same in each run.
"""

import threading

from tests.matrix import programs as p
from tests.matrix.shared import spinning
from understudy.host import Host
from understudy.verdict import StopKind
from understudy.vm import VM

ASLEEP = """
    b0 ff | mov al, 0ffh
    e6 21 | out 21h, al: no interrupts of the 8259
    fb    | sti
    f4    | hlt
    eb fc | jmp short -4
"""


def test_asleep_with_a_cable_waits_and_hears_what_comes() -> None:
    with VM("2M", net="lan=wait") as vm:
        p.start(vm, ASLEEP)
        assert vm.go(wall_seconds=0.05).kind is StopKind.WALL
        before, heard = vm.clock.now(), list[int]()

        def hear() -> None:
            heard.append(vm.clock.now())
            vm.stop("heard")

        threading.Timer(0.05, lambda: vm.post(hear)).start()
        assert vm.go(wall_seconds=20).kind is StopKind.STOPPED
        assert len(heard) == 1 and heard[0] >= before, "time has passed as it does outside"


def test_what_comes_wakes_at_the_same_instruction_in_each_run() -> None:
    def run() -> list[int]:
        woken: list[int] = []
        with Host(pcpus=2) as host:
            linked = spinning(host, "linked", ASLEEP, net="lan=same")
            busy = spinning(host, "busy", net="lan=same")
            host.run(budget=100_000)
            linked.post(lambda: woken.append(busy.instructions))
            host.run(budget=200_000)
            assert linked.ended is None
            return [*woken, busy.instructions, host.schedule.time.now()]

    assert run() == run()


NO_TICKS = """
    b0 30 | mov al, 30h
    e6 43 | out 43h, al: the 8254's channel 0 waits for a count
"""
ENDS = """
    b9 10 27 00 00 | mov ecx, 10000
    e2 fe          | loop $
    e6 f4          | out 0f4h, al
"""


def test_asleep_for_ever_is_told_when_nobody_is_left_who_could_send_anything() -> None:
    with Host() as host:
        sleepers = [spinning(host, name, NO_TICKS + ASLEEP, net="lan=lost") for name in "ab"]
        busy = spinning(host, "busy", ENDS, net="lan=lost")
        host.run()
        assert busy.ended is not None and busy.ended.kind is StopKind.DEBUG_EXIT
        for vm in sleepers:
            assert vm.ended is not None and vm.ended.kind is StopKind.STUCK
            assert "no timer is armed" in str(vm.ended)
            assert vm.instructions < 10
