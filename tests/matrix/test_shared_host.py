"""VMs on a host whose processors they share: what a switch keeps, and that nobody disturbs another.

Source: lecture, "Scheduling: Virtual CPUs".
Invariant: in virtual time two runs are one, however they are cut.
"""

import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.shared import CRASH, DEAF, RESET, SPIN, napping, running_ns, spinning, to_nap
from understudy.arch.msr import Msr
from understudy.guests.entry import CODE_64, Entry, long_mode, write_gdt
from understudy.host import Host
from understudy.image import Image
from understudy.machine.desk import Vpids
from understudy.sched.policy import PolicyError
from understudy.sched.seat import State
from understudy.sched.share import Share
from understudy.verdict import StopKind
from understudy.vm import VM

MS = 1_000_000
ROOT = Path(__file__).parents[2]
NOPS = "90 90 90 90 90 90 90 90 | nop"
PMU = [Msr.IA32_FIXED_CTR0 + n for n in range(3)] + [Msr.IA32_A_PMC0 + n for n in range(4)]
NOT_OURS = {"cr8", "apic_base"}  # of the processor's own APIC


def fill(vm: VM, pattern: int) -> None:
    """All that a guest can see, each register with a value of its own."""
    p.start(vm, NOPS)
    guest = vm.vcpus[0].guest
    values = {name: pattern << 16 | n << 4 for n, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
         "r14", "r15", "star", "lstar", "cstar", "fmask", "kernel_gs_base", "tsc_aux", "fs_base",
         "gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip"))}  # fmt: skip
    processor = guest.processor  # type: ignore[attr-defined]
    guest.set_registers(guest.registers() | values)
    live = {name: pattern << 20 | n << 12 for n, name in enumerate(("dr0", "dr1", "dr2", "dr3"))}
    live |= {"cr2": pattern << 24, "dr6": 0xFFFF_0FF0 | pattern & 0xF, "xcr0": 3 | pattern % 2 << 9}
    live |= {"pkru": pattern << 4, "pkrs": pattern << 6}
    processor.set_registers(live)
    image = bytearray(processor.fxsave())
    image[32 : 32 + 128] = bytes((pattern + n) & 0xFF if n % 16 < 10 else 0 for n in range(128))
    image[160:416] = bytes((pattern * 3 + n) & 0xFF for n in range(256))
    image[0:2] = struct.pack("<H", 0x37F & ~(pattern & 0x3F))  # FCW
    image[6:8] = struct.pack("<H", pattern & 0x7FF)  # FOP
    image[8:24] = struct.pack("<QQ", pattern << 8, pattern << 9)  # FIP, FDP
    image[24:28] = struct.pack("<I", 0x1F80 ^ pattern & 0x3F)
    processor.fxrstor(bytes(image))
    for n, msr in enumerate(PMU):
        processor.wrmsr(msr, pattern << 8 | n)
    processor.stir(bytes([pattern & 0xFF]) * 32)


def seen(vm: VM) -> dict[str, Any]:
    """All of it, in the midst of the guest's third instruction."""
    guest = vm.vcpus[0].guest
    processor = guest.processor  # type: ignore[attr-defined]
    guest.arm((1 << 32) - 1)
    exit = guest.resume(3)
    assert guest.is_inside, (exit.reason, exit.qualification)
    found: dict[str, Any] = dict(processor.registers())
    found = {name: value for name, value in found.items() if name not in NOT_OURS}
    found |= {f"msr {n:#x}": processor.rdmsr(n) for n in PMU}
    return found | {"fx": processor.fxsave(), "live": processor.save_live()}


def test_every_register_survives_a_switch() -> None:
    patterns = [0x15, 0x2A, 0x33, 0x47]
    expected = []
    for pattern in patterns:
        with VM("2M") as alone:
            fill(alone, pattern)
            expected.append(seen(alone))
    assert len({tuple(sorted(map(str, one.items()))) for one in expected}) == len(patterns)
    with Host(pcpus=2, ram="128M") as host:
        vms = [host.vm("2M") for _ in patterns]
        for vm, pattern in zip(vms, patterns, strict=True):
            fill(vm, pattern)
        guests = [vm.vcpus[0].guest for vm in vms]
        for n in range(13):  # 13 and 4 have no common divisor: each comes to each
            for guest in guests:
                guest.take_off()
            for k, processor in enumerate(host.processors):
                guests[(n + k) % 4].place(processor)
        for guest in guests:
            guest.take_off()
        found = []
        for n, vm in enumerate(vms):
            guests[n].place(host.processors[n % 2])
            found.append(seen(vm))
            vm.vcpus[0].leave_guest()
            guests[n].take_off()
        for vm in vms:
            vm.close()
    for got, wanted in zip(found, expected, strict=True):
        assert {name: got[name] for name in wanted if got[name] != wanted[name]} == {}


def outcome(pcpus: int, cut: Callable[[Host], None], policy: Any = "share") -> list[Any]:
    """Four VMs, two of which sleep most of the time, for 20 ms."""
    with Host(pcpus=pcpus, ram="64M", policy=policy) as host:
        vms = [
            spinning(host, "a", weight=2), napping(host, "b"), spinning(host, "c"),
            napping(host, "d"),
        ]  # fmt: skip
        cut(host)
        found = [(vm.counts()["exits"], vm.instructions, vm.counts()["scheduling"]) for vm in vms]
        for vm in vms:
            vm.close()
        return [*found, host.schedule.time.now()]


def pieces(host: Host) -> None:
    """In runs of 77,777 instructions, as far as 9 million, and looked at after each."""
    left = 9_000_000
    while left > 0:
        assert host.run(budget=min(left, 77_777)).kind == StopKind.BUDGET
        host.inspect()
        running = sum(seat.counts.ns[State.RUNNING] for vm in host.vms for seat in vm.claim.seats)
        assert sum(pcpu.running_ns for pcpu in host.schedule.pcpus) == running
        left -= 77_777


@pytest.mark.parametrize("pcpus", [1, 2, 4])
@pytest.mark.parametrize("policy", ["share", str(ROOT / "examples" / "round_robin.py")])
def test_one_run_is_every_run(pcpus: int, policy: str) -> None:
    def whole(host: Host) -> None:
        assert host.run(budget=9_000_000).kind == StopKind.BUDGET

    first = outcome(pcpus, whole, policy)
    assert first == outcome(pcpus, whole, policy)
    assert first == outcome(pcpus, pieces, policy)
    assert all(one[1] > 10 for one in first[:4])


def moved(pcpus: int, policy: Any, at: list[int]) -> list[Any]:
    """The same, each time on to another host, by snapshots of all VMs at one moment."""
    host = Host(pcpus=pcpus, ram="64M", policy=policy)
    vms = [spinning(host, "a", weight=2), napping(host, "b"), spinning(host, "c"),
           napping(host, "d")]  # fmt: skip
    for budget in [*at, 9_000_000 - sum(at)]:
        saved = [vm.save() for vm in vms]
        for vm in vms:
            vm.close()
        host.close()
        host = Host(pcpus=pcpus, ram="64M", policy=policy)
        vms = [type(vm).restore(data, host=host) for data, vm in zip(saved, vms, strict=True)]
        assert host.run(budget=budget).kind == StopKind.BUDGET
    found = [(vm.counts()["exits"], vm.instructions, vm.counts()["scheduling"]) for vm in vms]
    now = host.schedule.time.now()
    for vm in vms:
        vm.close()
    host.close()
    return [*found, now]


@pytest.mark.parametrize("pcpus", [1, 2, 4])
def test_a_run_goes_on_on_another_host(pcpus: int) -> None:
    def whole(host: Host) -> None:
        host.run(budget=9_000_000)

    expected = outcome(pcpus, whole)
    assert moved(pcpus, "share", [1_234_567, 2_345_678, 77_001]) == expected


def test_a_snapshot_that_does_not_say_where_it_ran() -> None:
    with Host(pcpus=2, ram="64M") as host, spinning(host, "a") as vm:
        host.run(budget=77_777)
        image = Image.of(vm.save(), VM._of_image)
        seat = image.state["place"]["seats"][0]
        assert (seat["state"], seat["pcpu"]) == ("running", 0)
        seat["pcpu"] = None
    with Host(pcpus=2, ram="64M") as host:
        again = image.restore(host=host)
        host.add_pool("other", pcpus=[0])  # it has to leave where it is
        host.run(deadline_ns=host.schedule.time.now() + MS)
        vms = [again, spinning(host, "c", pool="other")]
        for _ in range(3):
            before = [vm.instructions for vm in vms]
            host.run(deadline_ns=host.schedule.time.now() + 20 * MS)
            assert [vm.ended for vm in vms] == [None] * 2
            assert all(vm.instructions > old for vm, old in zip(vms, before, strict=True))
            for pcpu in host.schedule.pcpus:
                assert pcpu.there is not None
                assert pcpu.there.vcpu.guest.place_now is pcpu.processor


def test_one_vm_alone_is_as_on_processors_of_its_own() -> None:
    def counted(vm: VM) -> tuple[Any, ...]:
        exits = dict(vm.counts()["exits"])
        exits.pop("PREEMPTION_TIMER", None)  # turns end by it
        return vm.clock.now(), vm.instructions, exits

    with Host(pcpus=1, ram="64M") as host, napping(host, "alone") as vm:
        host.run(deadline_ns=5 * MS)
        shared = counted(vm)
    with VM("2M") as own:
        to_nap(own)
        own.go(deadline_ns=5 * MS)
        assert counted(own) == shared


def test_a_vm_that_ends_disturbs_no_other() -> None:
    with Host(pcpus=2, ram="128M") as host:
        others = [spinning(host, f"spin{n}") for n in range(6)]
        crash, deaf = spinning(host, "crash", CRASH), spinning(host, "deaf", DEAF)
        hello = spinning(host, "hello", p.HELLO)
        ended: list[str] = []
        host.on_end.append(lambda vm, stop: ended.append(f"{vm.name} {stop.kind}"))
        assert host.run(deadline_ns=30 * MS).kind == StopKind.DEADLINE
        assert sorted(ended) == ["crash triple-fault", "deaf stuck", "hello debug-exit"]
        assert [vm.name for vm in host.vms if vm.ended is None] == [vm.name for vm in others]
        crash.close()
        before = [vm.instructions for vm in others]
        host.run(deadline_ns=60 * MS)
        assert all(vm.instructions > old for vm, old in zip(others, before, strict=True))
        assert deaf.ended is not None and "RFLAGS.IF=0" in deaf.ended.detail
        for vm in [*others, deaf, hello]:
            vm.close()
        free = host.frames.free_count
        host.vm("2M").close()
        assert host.frames.free_count == free


def test_what_one_waits_for_the_others_go_on_meanwhile() -> None:
    with Host(pcpus=1, ram="64M") as host, spinning(host, "other") as other:
        hello = spinning(host, "hello", p.HELLO)
        stop = hello.go(wall_seconds=60)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 42)
        assert other.go(budget=100_000).kind == StopKind.BUDGET
        assert other.instructions >= 100_000
        hello.close()


def test_a_partition_never_switches_and_says_when_it_is_full() -> None:
    with Host(pcpus=2, ram="64M", policy="partition") as host:
        vms = [spinning(host, "a"), napping(host, "b")]
        with pytest.raises(PolicyError, match=r"^c/0: policy partition gives each vCPU a pCPU"):
            host.vm("2M", name="c")
        host.run(deadline_ns=20 * MS)
        counts = [vm.counts()["scheduling"][0] for vm in vms]
        assert [(one["switches"], one["migrations"]) for one in counts] == [({}, 0)] * 2
        assert all(not pcpu.switches for pcpu in host.schedule.pcpus)
        vms.pop().close()
        vms.append(spinning(host, "c"))
        for vm in vms:
            vm.close()


@pytest.mark.parametrize("slice_ms", [5, 50])
def test_switches_are_time_by_slice(slice_ms: int) -> None:
    with Host(pcpus=1, ram="64M", policy=Share(slice_ns=slice_ms * MS)) as host:
        vms = [spinning(host, f"{n}") for n in range(4)]
        host.run(deadline_ns=200 * MS)
        switches = host.schedule.pcpus[0].switches
        assert switches == {"slice": 200 // slice_ms - 1}
        assert [running_ns(vm) // MS for vm in vms] == [50] * 4
        for vm in vms:
            vm.close()


def test_in_real_time_they_run_and_wake_and_can_be_stopped() -> None:
    with Host(pcpus=2, ram="64M", clock="wall") as host:
        vms = [spinning(host, "a"), napping(host, "b"), spinning(host, "c")]
        hello = spinning(host, "hello", p.HELLO)
        assert hello.go(wall_seconds=60).kind == StopKind.DEBUG_EXIT
        assert host.run(wall_seconds=0.1).kind == StopKind.WALL
        assert host.run(until=lambda: all(vm.instructions for vm in vms)).kind == StopKind.UNTIL
        assert all(vm.instructions > 0 and vm.ended is None for vm in vms)
        naps = vms[1].claim.seats[0].counts
        stop = host.run(until=lambda: naps.wakes > 10, wall_seconds=60)
        assert stop.kind == StopKind.UNTIL
        timer = threading.Timer(0.05, host.stop, ("enough",))
        timer.start()
        stop = host.run()
        timer.join()
        assert (stop.kind, stop.detail) == (StopKind.STOPPED, "enough")
        for vm in [*vms, hello]:
            vm.close()


def test_a_vm_that_resets_starts_again_while_others_run() -> None:
    with Host(pcpus=1, ram="64M") as host, spinning(host, "other") as other:
        vm = host.vm("2M", name="again")
        starts: list[int] = []

        def load(machine: Any) -> Entry:
            starts.append(host.schedule.time.now())
            machine.memory.write(p.CODE, p.assemble(RESET if len(starts) < 4 else SPIN))
            write_gdt(machine.memory, CODE_64)
            return long_mode(machine.memory, "test", p.CODE)

        vm.boot(load)
        assert host.run(deadline_ns=40 * MS).kind == StopKind.DEADLINE
        assert len(starts) == 4 and starts == sorted(starts)
        assert vm.ended is None and min(vm.instructions, other.instructions) > MS
        vm.close()


def test_a_host_closes_its_vms() -> None:
    with Host(pcpus=1, ram="64M") as host:
        vms = [spinning(host, name) for name in "ab"]
        host.run(budget=100_000)
    assert all(vm.is_closed for vm in vms)
    vms[0].close()
    with pytest.raises(RuntimeError, match="closed"):
        host.run()


@pytest.mark.parametrize("end", [0, 77_777])
def test_techniques_of_paging_change_while_they_share(end: int) -> None:
    """Wherever the vCPU is: on a pCPU, in the midst of its guest's code, or on none."""
    with Host(pcpus=2, ram="128M") as host:
        vms = [spinning(host, "a"), napping(host, "b"), spinning(host, "c")]
        for paging in ("vtlb", "lazy", "ept", "eager", "ept"):
            host.run(deadline_ns=host.schedule.time.now() + 5 * MS)
            if end:
                host.run(budget=end)
            before = [vm.instructions for vm in vms]
            for vm in vms:
                vm.paging = paging
            host.run(deadline_ns=host.schedule.time.now() + 20 * MS)
            assert [(vm.paging, vm.ended) for vm in vms] == [(paging, None)] * 3
            assert all(vm.instructions > old for vm, old in zip(vms, before, strict=True))


def test_registers_of_who_is_nowhere_are_at_the_desk() -> None:
    with Host(pcpus=1, ram="64M") as host:
        vms = [spinning(host, name) for name in "abc"]
        host.run(budget=12_345_678)
        before = [vm.vcpus[0].registers() for vm in vms]
        assert [one["rip"] & ~7 for one in before] == [p.CODE] * 3
        assert len({one["rcx"] for one in before}) > 1
        assert "rip=" in vms[2].describe() and vms[1].inspect()["host"]
        vms[1].vcpus[0].set_registers(before[1] | {"r9": 99})
        after = [vm.vcpus[0].registers() for vm in vms]
        assert after == [before[0], before[1] | {"r9": 99}, before[2]]
        host.run(budget=30_000_000)
        assert vms[1].vcpus[0].registers()["r9"] == 99


def test_vpids_are_given_once() -> None:
    vpids = Vpids()
    assert [vpids.allocate() for _ in range(3)] == [1, 2, 3]
    vpids.free(2)
    assert [vpids.allocate() for _ in range(2)] == [2, 4]
    for _ in range(0xFFFF - 4):
        vpids.allocate()
    with pytest.raises(RuntimeError, match="65535 vCPUs at most"):
        vpids.allocate()


def test_an_overflow_is_told_to_the_vcpu_whose_counter_it_was() -> None:
    with Host(pcpus=1, ram="64M") as host:
        vms = [spinning(host, name) for name in "ab"]
        vcpu, processor = vms[0].vcpus[0], host.processors[0]
        host.run(budget=1000)
        vcpu.leave_guest()
        vcpu.msrs.write(0x1B, 0xFEE0_0D00)  # x2APIC mode
        vcpu.msrs.write(0x834, 0x55)  # LVT PC
        processor.apic.raise_vector(0xFE)  # as at the end of the last instruction
        vcpu.guest.take_off()
        assert processor.apic.pending() == -1
        assert [vm.vcpus[0].apic.pending() for vm in vms] == [0x55, -1]
