"""In real time each pCPU of a host has a thread: VMs compute at once, and all else is as in turns.

Source: ours.  What is asserted is what they did, never how long it took.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.shared import CRASH, DEAF, RESET, SPIN, napping, spinning
from tests.matrix.test_overcommit import ROOT, rounds, walking
from understudy.fleet.member import PAUSED
from understudy.guests.entry import CODE_64, Entry, GuestError, long_mode, write_gdt
from understudy.host import Host
from understudy.linux import VM
from understudy.paging import Paging
from understudy.sched.policy import PolicyError
from understudy.sched.schedule import Schedule
from understudy.sched.share import Share
from understudy.sched.threads import Threads
from understudy.vcpu.activity import Goal
from understudy.vcpu.loop import Vcpu
from understudy.verdict import StopKind

pytestmark = pytest.mark.timeout(600)
LONG_S = 300.0  # never reached: what is waited for comes before


def inside(host: Host) -> int:
    """How many of its vCPUs are in the guest in this moment, for all that one knows."""
    schedule = host.schedule
    assert isinstance(schedule, Threads)
    return sum(door.is_in for house in schedule.meetings.values() for door in house.doors)


def left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pCPU")]


def after(host: Host, count: int, look: Callable[[], Any] = lambda: None) -> list[Any]:
    """Run for so many exits, and look around at each."""
    seen: list[Any] = []

    def until() -> bool:
        seen.append(look())
        return len(seen) >= count

    assert host.run(until=until, wall_seconds=LONG_S).kind is StopKind.UNTIL
    return seen


def go_on(host: Host, vms: list[VM]) -> None:
    """All of them still advance."""
    before = [vm.instructions for vm in vms]

    def all_have() -> bool:
        return all(vm.instructions > old for vm, old in zip(vms, before, strict=True))

    assert host.run(until=all_have, wall_seconds=LONG_S).kind is StopKind.UNTIL


@pytest.mark.parametrize(("pcpus", "clock", "kind"), [
    (1, "wall", Schedule), (2, "virtual", Schedule), (2, "wall", Threads),
])  # fmt: skip
def test_only_several_pcpus_in_real_time_have_threads(
    pcpus: int, clock: str, kind: type[Schedule]
) -> None:
    with Host(pcpus=pcpus, ram="64M", clock=clock) as host:
        assert type(host.schedule) is kind


def test_vms_are_in_the_guest_at_once_and_a_run_leaves_no_thread() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, name) for name in "abc"]
        assert max(after(host, 100, lambda: inside(host))) == 1  # beside the one that asks
        assert (left(), inside(host)) == ([], 0)
        go_on(host, vms)
        assert host.run(budget=1_000_000).kind is StopKind.BUDGET  # by turns
        go_on(host, vms)
        while not all(vm.counts()["scheduling"][0]["switches"] for vm in vms):
            after(host, 100, lambda: inside(host))  # for slices to end
        assert sum(vm.go(wall_seconds=0.1).kind is StopKind.WALL for vm in vms) == 3
        assert left() == []


def test_counting_instructions_brings_nobody_out() -> None:
    """Two that ask it at each exit would keep each other from executing anything."""
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, name) for name in "ab"]
        assert isinstance(host.schedule, Threads)
        go_on(host, vms)
        before = [house.changes for house in host.schedule.meetings.values()]
        seen = after(host, 200, lambda: sum(vm.instructions for vm in vms))
        assert [house.changes for house in host.schedule.meetings.values()] == before
        assert seen == sorted(seen) and seen[-1] > seen[0]


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
def test_what_a_callback_raises_ends_the_run_and_nothing_else(kind: type[BaseException]) -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, name) for name in "ab"]
        callers: set[str] = set()

        def fail() -> bool:
            callers.add(threading.current_thread().name)
            if callers >= {"pCPU 0", "pCPU 1"}:
                raise kind("ours")
            return False

        with pytest.raises(kind, match="ours"):
            host.run(until=fail)
        assert left() == []
        go_on(host, vms)


def test_an_interrupt_ends_the_run_between_two_turns() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, "a"), napping(host, "b")]
        for run in (host.run, vms[0].go):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                run()
            timer.join()
            assert left() == []
            go_on(host, vms)


def test_a_vm_that_ends_disturbs_no_other_and_another_comes_in_its_place() -> None:
    with Host(pcpus=2, ram="128M", clock="wall") as host:
        others = [spinning(host, "spin"), napping(host, "nap")]
        ended: Counter[str] = Counter()

        def replace(vm: VM, stop: Any) -> None:
            assert inside(host) == 0  # nobody executes when a VM ends
            ended[str(stop.kind)] += 1
            vm.close()
            if ended.total() < 30:
                spinning(host, "next", (CRASH, p.HELLO, DEAF)[ended.total() % 3])

        host.on_end.append(replace)
        for program in (CRASH, p.HELLO, DEAF):
            spinning(host, "first", program)
        frames = host.frames.free_count
        stop = host.run(until=lambda: ended.total() >= 32, wall_seconds=LONG_S)
        assert stop.kind is StopKind.UNTIL
        assert set(ended) == {"triple-fault", "debug-exit", "stuck"}
        assert host.vms == others and host.frames.free_count > frames
        go_on(host, others)


def test_a_vm_that_resets_starts_again_while_others_run() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        other, vm = spinning(host, "other"), host.vm("2M", name="again")
        starts: list[int] = []

        def load(machine: Any) -> Entry:
            starts.append(inside(host))
            machine.memory.write(p.CODE, p.assemble(RESET if len(starts) < 20 else SPIN))
            write_gdt(machine.memory, CODE_64)
            return long_mode(machine.memory, "test", p.CODE)

        vm.boot(load)
        stop = host.run(until=lambda: len(starts) == 20, wall_seconds=LONG_S)
        assert stop.kind is StopKind.UNTIL
        assert starts == [0] * 20
        go_on(host, [vm, other])


def test_a_vm_that_finds_nothing_to_start_again_ends_alone() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        other, vm = spinning(host, "other"), host.vm("2M", name="again")
        found = [True, False, False, True]

        def load(machine: Any) -> Entry:
            if not found.pop(0):
                raise GuestError("nothing to start")
            machine.memory.write(p.CODE, p.assemble(RESET if found else SPIN))
            write_gdt(machine.memory, CODE_64)
            return long_mode(machine.memory, "test", p.CODE)

        vm.boot(load)
        stop = host.run(until=lambda: vm.ended is not None, wall_seconds=LONG_S)
        assert stop.kind is StopKind.UNTIL and vm.ended
        assert vm.ended.kind is StopKind.ERROR
        assert vm.ended.detail.startswith("the guest cannot start again: nothing to start\n")
        with pytest.raises(GuestError, match="nothing to start"):
            vm.reset()
        go_on(host, [other])
        assert vm.go(until=lambda: not found, wall_seconds=LONG_S).kind is StopKind.UNTIL


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_who_is_where_changes_in_callbacks(clock: str) -> None:
    """Pools, policies, weights, who takes part: of others, and of the one that asks."""
    with Host(pcpus=3, ram="128M", clock=clock) as host:
        host.add_pool("own", "share", pcpus=[2])
        vms = [spinning(host, f"spin{n}") for n in range(3)] + [napping(host, "nap")]
        done: Counter[int] = Counter()

        def pause() -> None:
            for vm in vms[1:3]:
                if vm.ended is None:
                    host.schedule.end(vm.claim, PAUSED)
                else:
                    host.schedule.resume(vm.claim)

        def hop() -> None:
            host.move(1, "default" if host.schedule.pcpus[1].pool == "own" else "own")

        def cross() -> None:
            for vm in vms[:2]:
                vm.pool = "default" if vm.pool == "own" else "own"

        def weigh() -> None:
            vms[0].weight, vms[1].cap = 3 if vms[0].weight == 1 else 1, None if vms[1].cap else 0.5

        def save() -> None:
            VM.restore(vms[3].save(), host=host).close()

        def refuse() -> None:
            with pytest.raises(PolicyError):
                host.use_policy("partition")

        acts = (pause, hop, cross, weigh, save, refuse,
                lambda: host.use_policy(Share(slice_ns=100_000)))  # fmt: skip

        def act() -> bool:
            number = done.total()
            acts[number % len(acts)]()
            done[number % len(acts)] += 1
            return done.total() >= 40 * len(acts)

        assert host.run(until=act, wall_seconds=LONG_S).kind is StopKind.UNTIL
        for vm in vms:
            if vm.ended is not None:
                host.schedule.resume(vm.claim)
            vm.cap = None
        go_on(host, vms)
        for vm in vms:
            vm.close()


def test_a_refused_change_puts_no_vcpu_on_two_pcpus() -> None:
    """One pCPU idles, and would take whoever waits for one while it is still in the guest."""
    with Host(pcpus=3, ram="64M", clock="wall") as host:
        host.add_pool("empty")
        vms = [spinning(host, name) for name in "ab"]
        executing: set[Vcpu] = set()
        twice: list[Vcpu] = []

        def watched(vcpu: Vcpu, run: Callable[[Goal], Any]) -> Callable[[Goal], Any]:
            def watch(goal: Goal) -> Any:
                if vcpu in executing:
                    twice.append(vcpu)
                    raise AssertionError("two threads execute it")
                executing.add(vcpu)
                try:
                    return run(goal)
                finally:
                    executing.discard(vcpu)

            return watch

        def refused() -> None:
            for vm in vms:
                with pytest.raises(PolicyError):
                    host.move(vm, "empty")

        for vm in vms:
            vm.vcpus[0].run = watched(vm.vcpus[0], vm.vcpus[0].run)  # type: ignore[method-assign]
        after(host, 300, refused)
        assert not twice
        go_on(host, vms)


def test_others_look_and_change_while_it_runs() -> None:
    """Another thread than those of the pCPUs."""
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, "a"), napping(host, "b"), spinning(host, "c")]
        problems: list[BaseException] = []
        runs = threading.Event()
        images: list[bytes] = []

        def look() -> None:
            runs.wait()
            try:
                for number in range(60):
                    told = host.inspect()
                    assert len(told["vms"]) == 3  # type: ignore[arg-type]
                    assert sum(vm.instructions for vm in vms) > 0
                    vms[number % 3].weight = 1 + number % 2
                    vms[number % 3].paging = ("ept", "lazy")[number % 2]
                    host.use_policy("share")
                    assert vms[number % 3].describe()
                    images.append(vms[1].save())
            except BaseException as problem:
                problems.append(problem)

        go_on(host, vms)
        thread = threading.Thread(target=look)
        thread.start()
        host.run(until=lambda: runs.set() or not thread.is_alive(), wall_seconds=LONG_S)
        thread.join()
        assert not problems, problems
        assert len(images) == 60
        go_on(host, vms)
        again = VM.restore(images[-1], host=host)
        go_on(host, [*vms, again])


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_who_asks_for_a_stop_is_told_once(clock: str) -> None:
    with Host(pcpus=2, ram="64M", clock=clock) as host:
        vm, other = spinning(host, "two", cpus=2), spinning(host, "other")
        for vcpu in vm.vcpus[1:]:
            vcpu.state.activity = vm.vcpus[0].state.activity
            vcpu.set_registers(vm.vcpus[0].registers())
        vm.stop()
        assert vm.go(wall_seconds=LONG_S).kind is StopKind.STOPPED
        assert vm.go(budget=100_000).kind is StopKind.BUDGET
        go_on(host, [vm, other])
        vm.stop()
        assert host.run(until=lambda: vm.ended is not None, wall_seconds=LONG_S)
        assert vm.ended is not None and vm.ended.kind is StopKind.STOPPED
        go_on(host, [other, vm])


@pytest.mark.timeout(60)
def test_a_stop_is_heard_by_who_waits_for_another_to_come_to_rest() -> None:
    """It would not sleep, and not let the other one have the lock."""
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, name) for name in "ab"]

        def until() -> bool:
            if inside(host) == 1:  # the other one
                with host.schedule.changing():
                    host.stop("now")
            return False

        for _ in range(20):
            assert host.run(until=until).kind is StopKind.STOPPED
        go_on(host, vms)


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_each_finds_what_it_wrote_though_others_take_its_frames(paging: str) -> None:
    """While it is in the guest itself: three VMs of 16 MBytes on a host of 32."""
    with Host(pcpus=2, ram="32M", clock="wall", policy=Share(slice_ns=1_000_000)) as host:
        free = host.frames.free_count
        vms = [walking(host, number, paging=paging) for number in range(3)]
        assert host.stock.is_on
        for _ in range(20):
            host.run(wall_seconds=0.5)
            assert [vm.ended for vm in vms] == [None] * 3
            if all(rounds(vm) >= 2 for vm in vms):
                break
        assert host.stock.swap is not None and host.stock.swap.written > 0
        for vm in vms:
            vm.close()
        assert free - host.frames.free_count == ROOT * len(host.entered)


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", ["ept", "lazy"])
def test_two_linuxes_of_two_processors_each(paging: str) -> None:
    """Programs that share memory, and a VM that crashes beside them."""
    sums = "ls -lR /bin | md5sum; ls -lR /bin | md5sum"
    with Host(pcpus=2, ram="1G", clock="wall") as host:
        options = {"memory": "128M", "cpus": 2, "append": "reboot=t", "triple_fault": "stop"}
        try:
            first, second = (
                host.linux(name=name, paging=paging, **options) for name in ("first", "second")
            )
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
        for vm in (first, second):
            vm.wait_for_prompt()
        for vm in (first, second):  # one that idles hardly exits
            vm.send("for each in 1 2 3 4 5 6 7 8; do ls -lR /bin; done | md5sum\n")
        seen = Counter(after(host, 3000, lambda: inside(host)))
        assert (max(seen) > 0) == (paging == "ept")
        second.post(lambda: None)
        found = first.run(f"(({sums}) & ({sums}) & wait) | sort | uniq -c").output
        assert len(found.splitlines()) == 1 and found.split()[0] == "4"
        second.send("reboot -f\n")
        assert host.run(until=lambda: second.ended is not None, wall_seconds=LONG_S)
        assert second.ended is not None and second.ended.kind is StopKind.TRIPLE_FAULT
        second.close()
        assert first.run("nproc; dmesg | grep -c -e stall -e BUG").output == "2\n0\n"
