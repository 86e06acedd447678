"""The first guests: a few instructions each, through the whole hypervisor.

Every program runs under each engine and each EPT page size; counts are asserted.
"""

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.matrix import programs as p
from understudy import silicon
from understudy.arch.address import PAGE_SHIFT
from understudy.image_file import SnapshotError
from understudy.vcpu.activity import Activity
from understudy.verdict import StopKind
from understudy.vm import VM

ENGINES = ("dbt", "reference")
IOAPIC_VERSION = 0x20
PAGES = ("4K", "2M", "1G")


@pytest.fixture(params=list(itertools.product(ENGINES, PAGES)), ids="-".join)
def vm(request: pytest.FixtureRequest) -> Iterator[VM]:
    engine, largest = request.param
    with VM("16M", engine=engine, largest_page=largest) as made:
        yield made


def test_a_line_on_the_serial_port(vm: VM) -> None:
    heard: list[bytes] = []
    vm.console.on_output.append(heard.append)
    p.start(vm, p.HELLO)
    stop = vm.go(wall_seconds=60)
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 42), stop
    assert b"".join(heard) == b"hello\n"
    assert vm.counts()["exits"] == {"IO_INSTRUCTION": 7}


def test_cpuid_exits_each_time(vm: VM) -> None:
    p.start(vm, p.CPUID_LOOP)
    assert vm.go(wall_seconds=60).kind == StopKind.DEBUG_EXIT
    counts = vm.counts()
    assert counts["exits"] == {"CPUID": 1000, "IO_INSTRUCTION": 1}
    assert counts["instructions"] == 1 + 3 * 1000 + 1  # what exits is not retired


def test_computing_needs_no_exits(vm: VM) -> None:
    p.start(vm, p.CHECKSUM)
    stop = vm.go(wall_seconds=60)
    value = 0
    for _ in range(100_000):
        value = (value * 1664525 + 1013904223) & 0xFFFF_FFFF
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, value)
    assert vm.counts()["exits"] == {"IO_INSTRUCTION": 1}
    assert vm.instructions == 3 + 5 * 100_000


def test_strings_of_ports(vm: VM) -> None:
    heard: list[bytes] = []
    vm.console.on_output.append(heard.append)
    text = bytes(range(32, 127)) * 60
    vm.memory.write(p.DATA, text)
    p.start(vm, p.OUTSB)
    assert vm.go(wall_seconds=60).kind == StopKind.DEBUG_EXIT
    assert b"".join(heard) == text[:5000]


def test_device_memory(vm: VM) -> None:
    p.start(vm, p.IOAPIC_VERSION)
    stop = vm.go(wall_seconds=60)
    assert (stop.kind, stop.status & 0xFF) == (StopKind.DEBUG_EXIT, IOAPIC_VERSION)
    assert vm.counts()["exits"] == {"IO_INSTRUCTION": 1, "EPT_VIOLATION": 2}


def test_the_apic_timer_wakes_a_halted_guest(vm: VM) -> None:
    idt = p.handle(vm, 0x40, p.DEADLINE_HANDLER)
    p.start(vm, p.DEADLINES, **idt)
    stop = vm.go(wall_seconds=60)
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 3), stop
    assert 3_000_000 <= vm.clock.now() < 3_000_500 + 1000  # the last OUT takes 1 us
    counts = vm.counts()
    assert counts["injected"] == {"0x40": 3}
    assert counts["exits"]["HLT"] == 3


def test_the_8254_interrupts_through_the_8259s(vm: VM) -> None:
    idt = p.handle(vm, 0x20, p.PIT_HANDLER)
    p.start(vm, p.PIT, **idt)
    stop = vm.go(wall_seconds=60)
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 5), stop
    assert vm.counts()["injected"] == {"0x20": 5}
    period = 4096 * 1_000_000_000 // 1_193_182
    # Mode 2 begins with the output high, as firmware has left it: no edge at once, one a period.
    assert 5 * period <= vm.clock.now() < 6 * period


def test_an_unknown_msr_faults(vm: VM) -> None:
    idt = p.handle(vm, 13, p.GP_HANDLER)
    p.start(vm, p.UNKNOWN_MSR, **idt)
    stop = vm.go(wall_seconds=60)
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 13), stop


def test_interpreted_and_native_instructions_side_by_side(vm: VM) -> None:
    p.start(vm, p.SWAPGS, gs_base=0x1111, kernel_gs_base=0x2222, cr4=0x1_0020)
    assert vm.go(wall_seconds=60).status == 0x2222


def test_a_guest_that_cannot_go_on_is_reported_decoded(vm: VM) -> None:
    for program, kind, words in (
        (p.UD2, StopKind.TRIPLE_FAULT, "ud2"),
        (p.CLI_HLT, StopKind.STUCK, "RFLAGS.IF=0"),
        (p.NOWHERE, StopKind.ERROR, "executes at gpa 0x80000000"),
    ):
        p.start(vm, program, idtr_limit=0)
        stop = vm.go(wall_seconds=60)
        assert stop.kind == kind, stop
        assert words in stop.detail
        assert "cr0=CR0(PG" in stop.detail
        vm.vcpus[0].state.activity = Activity.ACTIVE


def test_a_hung_guest_is_ended_by_each_limit(vm: VM) -> None:
    p.start(vm, p.SPIN)
    assert vm.go(budget=10_000).kind == StopKind.BUDGET
    assert vm.instructions == 10_000
    assert vm.go(wall_seconds=0.05).kind == StopKind.WALL
    now = vm.clock.now()
    assert vm.go(deadline_ns=now + 100_000, wall_seconds=60).kind == StopKind.DEADLINE
    assert now + 100_000 <= vm.clock.now() < now + 101_000


def test_a_moved_frame_is_seen_at_once(vm: VM) -> None:
    p.start(vm, p.READ_DATA)
    vm.memory.write(p.DATA, b"\x01\0\0\0")
    assert vm.go(wall_seconds=60).status == 1
    gfn = p.DATA >> PAGE_SHIFT
    pfn = vm.host.frames.allocate()
    vm.host.memory.write(pfn << PAGE_SHIFT, b"\x02\0\0\0")
    old = vm.memory.p2m.lookup(gfn)
    assert old is not None
    vm.memory.p2m.map(gfn, pfn, 1)
    p.start(vm, p.READ_DATA)
    assert vm.go(wall_seconds=60).status == 2
    vm.memory.p2m.map(gfn, old, 1)
    p.start(vm, p.READ_DATA)
    assert vm.go(wall_seconds=60).status == 1
    vm.host.release(pfn)


# --- one run is every run ---


def timers(engine: str) -> VM:
    made = VM("16M", engine=engine)
    idt = p.handle(made, 0x20, p.PIT_HANDLER)
    p.start(made, p.PIT, **idt)
    return made


def outcome(vm: VM) -> tuple[int, int, dict[str, int], dict[str, int], int]:
    counts = vm.counts()
    return (
        vm.clock.now(), counts["instructions"], counts["exits"], counts["injected"],
        vm.processors[0].state_hash(),
    )  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_are_one_run(engine: str) -> None:
    results = []
    for _ in range(2):
        with timers(engine) as vm:
            assert vm.go(wall_seconds=60).kind == StopKind.DEBUG_EXIT
            results.append(outcome(vm))
    assert results[0] == results[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_chopped_run_is_the_same_run(engine: str) -> None:
    with timers(engine) as whole:
        whole.go(wall_seconds=60)
        expected = outcome(whole)
    chance = random.Random(7)
    with timers(engine) as chopped:
        while (stop := chopped.go(budget=chance.randrange(1, 12))).kind == StopKind.BUDGET:
            pass
        assert stop.kind == StopKind.DEBUG_EXIT
        assert outcome(chopped)[:4] == expected[:4]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_saved_and_loaded_run_is_the_same_run(engine: str) -> None:
    with timers(engine) as whole:
        whole.go(wall_seconds=60)
        expected = outcome(whole)
    vm = timers(engine)
    while (stop := vm.go(budget=7)).kind == StopKind.BUDGET:
        saved = vm.save()
        vm.close()
        vm = VM.restore(saved)
    assert stop.kind == StopKind.DEBUG_EXIT
    assert outcome(vm)[:4] == expected[:4]
    vm.close()


def test_what_is_no_snapshot_is_refused() -> None:
    with timers("reference") as vm:
        saved = vm.save()
    for bad in (b"", b"rubbish", saved[: len(saved) // 2], saved[:40], saved[:-3]):
        with pytest.raises(SnapshotError):
            VM.restore(bad)


def test_an_unused_guest_costs_next_to_nothing() -> None:
    with VM("3G") as vm:
        assert vm.host.memory.resident_bytes() < 1 << 20


def test_the_machine_is_real() -> None:
    """This folder is for the compiled machine; fakes belong to tests/unit."""
    assert silicon.Processor.__module__.startswith("understudy")
