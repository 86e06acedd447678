"""A host without a free frame: who needs one then ends in words, and can go on when there is one.

What: clones, which share all their memory, run programs that write it in every way that there is.
Whenever one ends for want of a frame, the host gets just one more, and it goes on.  In the end it
is where a clone with enough room is: no event is lost, no device was asked twice.
Source: docs/reference/bounds.md.
Invariants: nothing but a `Stop`, or OutOfFrames to who has asked for frames; a neighbor on the same
host goes on; all frames are given back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import test_task_switch as tasks
from tests.matrix.programs import (
    CODE,
    DEADLINE_HANDLER,
    DEADLINES,
    HELLO,
    assemble,
    handle,
    start,
)
from understudy.control import ControlError, ControlSocket, ask
from understudy.guests.entry import Entry, long_mode
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.machine import Machine
from understudy.paging import Paging
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

TECHNIQUES = sorted(Paging.ALL)
EDGE = 0x30_0FFC  # four bytes before a page's end
HOLE = 0xD000_0000  # neither RAM nor a device
MANY = 200  # frames that no program here needs

STORES = f"""
    89 07                | mov [rdi], eax
    48 89 07             | mov [rdi], rax          ; into the next page, too
    0f ae 87 00 20 00 00 | fxsave [rdi + 0x2000]
    f0 0f c1 87 00 50 00 00 | lock xadd [rdi + 0x5000], eax
    {"e6 f4 | out 0xf4, al"}
"""
EXCEPTIONS = """
    bc 00 08 30 00       | mov esp, 0x300800       ; a stack that was not used yet
    cc                   | int3
    bc 00 18 30 00       | mov esp, 0x301800
    cd 20                | int 0x20
    bc 00 28 30 00       | mov esp, 0x302800
    0f 0b                | ud2
    bc 00 38 30 00       | mov esp, 0x303800
    8b 04 25 00 00 00 f0 | mov eax, [-0x10000000]  ; #PF
    e6 f4                | out 0xf4, al
"""
COUNT = """
    41 ff c0             | inc r8d
    48 cf                | iretq
"""
COUNT_AND_SKIP_2 = """
    41 ff c0             | inc r8d
    48 83 04 24 02       | add qword [rsp], 2
    48 cf                | iretq
"""
COUNT_AND_SKIP_7 = """
    41 ff c0             | inc r8d
    48 83 44 24 08 07    | add qword [rsp + 8], 7
    48 83 c4 08          | add rsp, 8
    48 cf                | iretq
"""
INPUT = """
    66 ba 90 99          | mov dx, 0x9990          ; nobody's; each access is counted
    b9 07 00 00 00       | mov ecx, 7
    f3 6c                | rep insb
    e6 f4                | out 0xf4, al
"""
FROM_DEVICE = """
    be 00 00 00 d0       | mov esi, HOLE
    b9 10 00 00 00       | mov ecx, 16
    f3 a4                | rep movsb
    bc 00 18 30 00       | mov esp, 0x301800
    ff 36                | push qword [rsi]
    bf 00 20 30 00       | mov edi, 0x302000
    b9 00 08 00 00       | mov ecx, 2048
    f3 48 ab             | rep stosq
    e6 f4                | out 0xf4, al
"""
CLOCK = """
    b9 01 4d 56 4b       | mov ecx, MSR_SYSTEM_TIME
    b8 01 00 30 00       | mov eax, 0x300001
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    8b 04 25 00 00 30 00 | mov eax, [0x300000]
    e6 f4                | out 0xf4, al
"""
TABLES = """
    c7 87 08 40 00 00 83 00 20 00 | mov dword [rdi + 0x4008], 0x200083
    c7 87 10 40 00 00 83 00 00 00 | mov dword [rdi + 0x4010], 0x83
    0f 20 d8             | mov rax, cr3
    0f 22 d8             | mov cr3, rax
    a1 00 00 40 00 00 00 00 00 | mov eax, [0x400000]
    ff 04 25 00 00 20 00 | inc dword [0x200000]
    e6 f4                | out 0xf4, al
"""

Program = Callable[[VM], None]


def exceptions(vm: VM) -> None:
    """Each pushes its frame onto a page of its own."""
    idt: dict[str, int] = {}
    for vector, handler in ((3, COUNT), (0x20, COUNT), (6, COUNT_AND_SKIP_2),
                            (14, COUNT_AND_SKIP_7)):  # fmt: skip
        idt = handle(vm, vector, handler)
    start(vm, EXCEPTIONS, **idt)


def task_switch(name: str) -> Program:
    """One of those that are compared with the bare machine."""
    a, b, task, handler, _ = tasks.CASES[name]

    def load(vm: VM) -> None:
        for at, data in tasks.memory_image(a, b, task, handler).items():
            vm.memory.write(at, data)
        vm.enter(Entry(tasks.registers("none"), "test"))

    return load


PROGRAMS: dict[str, Program] = {
    "stores": lambda vm: start(vm, STORES, rdi=EDGE & -16 | 0xFF0, rax=77),
    "exceptions": exceptions,
    "INS": lambda vm: start(vm, INPUT, rdi=EDGE),
    "interrupts": lambda vm: start(vm, DEADLINES, **handle(vm, 0x40, DEADLINE_HANDLER)),
    "from a device": lambda vm: start(vm, FROM_DEVICE, rdi=EDGE),
    "an MSR's page": lambda vm: start(vm, CLOCK),
    "page tables": lambda vm: start(vm, TABLES),
    **{f"task switch, {name}": task_switch(name) for name in (
        "call and return", "jump", "int n", "an exception", "to a task of 16 bits")},
}  # fmt: skip


@contextmanager
def full(host: Host) -> Iterator[list[int]]:
    """Nobody else gets a frame; those that one can give back."""
    taken: list[int] = []
    while host.frames.free_count:
        for pfn, count in host.frames.allocate_runs(host.frames.free_count):
            taken += range(pfn, pfn + count)
    try:
        yield taken
    finally:
        host.frames.free_all([(pfn, 1) for pfn in taken])


def answers(vm: VM) -> None:
    """A neighbor, whose memory is its own."""
    start(vm, HELLO)
    assert vm.go(budget=1000).status == 42


def outcome(vm: VM, stop: Stop) -> dict[str, Any]:
    """All that a program has come to."""
    registers = vm.vcpus[0].registers()
    return {
        "stop": (stop.kind, stop.status), "registers": registers, "instructions": vm.instructions,
        "memory": vm.memory.read(0, vm.memory.size), "unclaimed": dict(vm.bus.unclaimed),
    }  # fmt: skip


def run(vm: VM) -> Stop:
    """To the program's end."""
    return vm.go(budget=100_000)


def run_frame_by_frame(vm: VM, host: Host, taken: list[int], neighbor: VM) -> tuple[Stop, int]:
    """The same; each time that it ends for want of a frame the host gets one.  How often it did."""
    stops = 0
    while (stop := run(vm)).kind is StopKind.ERROR:
        assert "are free" in stop.detail.partition("\n")[0]
        answers(neighbor)
        host.frames.free(taken.pop(), 1)
        stops += 1
        assert stops < MANY
    return stop, stops


@pytest.mark.parametrize("paging", TECHNIQUES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_frames_that_come_one_by_one(name: str, paging: str) -> None:
    with Host("64M") as host:
        free = host.frames.free_count
        neighbor, vm = VM("4M", host=host), VM("16M", host=host, paging=paging)
        PROGRAMS[name](vm)
        image = vm.snapshot()
        at_ease, starved = (image.restore(host=host) for _ in range(2))
        expected = outcome(at_ease, run(at_ease))
        assert expected["stop"][0] is StopKind.DEBUG_EXIT
        at_ease.close()
        with full(host) as taken:
            stop, stops = run_frame_by_frame(starved, host, taken, neighbor)
            assert host.frames.free_count == 0
            assert stops > 1
            assert outcome(starved, stop) == expected
        for one in (starved, image, vm, neighbor):
            one.close()
        assert host.frames.free_count == free


# --- reset ---

RESET = """
    ff 05 fa 00 20 00    | inc dword [rip + 0x2000fa]
    b0 06                | mov al, 6
    66 ba f9 0c          | mov dx, 0xcf9
    ee                   | out dx, al
    eb fe                | jmp $
"""


def resetting(host: Host, paging: str) -> VM:
    """A VM that writes something and resets itself, as soon as it runs."""
    vm = VM("16M", host=host, paging=paging)

    def load(machine: Machine) -> Entry:
        machine.memory.write(CODE, assemble(RESET))
        return long_mode(machine.memory, "test", CODE)

    vm.boot(load)
    return vm


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_reset_of_one_that_shares_its_memory(paging: str) -> None:
    """Of a clone, and of the VM of an image: the run ends, and the next one resets."""
    with Host("64M") as host:
        free = host.frames.free_count
        neighbor, vm = VM("4M", host=host), resetting(host, paging)
        image = vm.snapshot()
        (clone,) = image.fork()
        for one in (clone, vm):
            resets: list[int] = []
            one.on_reset.append(lambda r=resets: r.append(1))
            assert one.go(budget=3).kind is StopKind.BUDGET  # what it writes has a copy
            with full(host):
                for _ in range(2):
                    stop = one.go(budget=100)
                    assert stop.kind is StopKind.ERROR
                    assert "the guest cannot start again: " in stop.detail.partition("\n")[0]
                    answers(neighbor)
                assert not resets
                assert one.memory.read_u32(0x30_0100) == 1  # as it was
            assert one.go(budget=100, until=lambda r=resets: bool(r)).kind is StopKind.UNTIL
            assert one.memory.read_u32(0x30_0100) == 0
            one.close()
        image.close()
        neighbor.close()
        assert host.frames.free_count == free


def test_a_reset_of_one_that_shares_nothing_needs_no_more() -> None:
    with Host("64M") as host:
        vm = resetting(host, "ept")
        with full(host):
            resets: list[int] = []
            vm.on_reset.append(lambda: resets.append(1))
            assert vm.go(until=lambda: len(resets) == 3).kind is StopKind.UNTIL
        vm.close()


# --- those who ask for frames ---


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_those_who_ask_for_a_vm_get_all_of_it_or_nothing(paging: str) -> None:
    with Host("64M") as host, VM("4M", host=host, paging=paging) as vm:
        start(vm, HELLO)
        data = vm.save()
        with vm.snapshot() as image:
            (clone,) = image.fork()
            clone.close()
            each = 0
            with full(host) as taken:
                wishes: list[Callable[[], Any]] = [
                    lambda: VM("1M", host=host), lambda: VM.restore(data, host=host), image.fork,
                    lambda: image.restore(host=host), lambda: image.fork(3),
                ]  # fmt: skip
                while True:  # at each place where one can find nothing more
                    before = host.frames.free_count, list(host.processors)
                    for wish in wishes:
                        with suppress(OutOfFrames):
                            made = wish()
                            for one in made if isinstance(made, list) else [made]:
                                one.close()
                            each += 1
                        assert (host.frames.free_count, host.processors) == before
                    if each == len(wishes):
                        break
                    each = 0
                    give = min(len(taken), 97)
                    host.frames.free_all([(taken.pop(), 1) for _ in range(give)])
        assert vm.go(budget=1000).status == 42


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_snapshot_needs_no_frame(paging: str) -> None:
    with Host("64M") as host, VM("4M", host=host, paging=paging) as vm:
        start(vm, HELLO)
        vm.go(budget=10)
        with full(host):
            data = vm.save()
            vm.snapshot().close()
            vm.inspect(vm.vcpus[0].registers()["rip"])
            assert vm.go(budget=1000).status == 42
        with VM.restore(data) as again:
            assert again.go(budget=1000).status == 42


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_another_technique_for_which_there_is_no_room(paging: str, tmp_path: Path) -> None:
    """Asked for by the VM's user, from another thread, or through the control socket."""
    other = "ept" if paging == "vtlb" else "vtlb"
    with Host("64M") as host, VM("4M", host=host, paging=paging) as vm:
        start(vm, "eb fe | jmp $")
        vm.go(budget=10)
        with full(host):
            with pytest.raises(OutOfFrames):
                vm.change_paging(other)
            vm.paging = other
            assert "are free" in (stop := vm.go(budget=10)).detail.partition("\n")[0]
            assert (stop.kind, vm.paging) == (StopKind.ERROR, paging)
            assert vm.go(budget=10).kind is StopKind.BUDGET
            with ControlSocket(vm, tmp_path / "socket") as socket:
                ends: list[Stop] = []
                thread = threading.Thread(target=lambda: ends.append(vm.go()))
                thread.start()
                with pytest.raises(ControlError, match=r"^\d+ frames wanted, \d+ are free$"):
                    ask(socket.path, {"do": "paging", "to": other})
                assert ask(socket.path, {"do": "status"})["paging"] == paging
                vm.stop()
                thread.join()
            assert [stop.kind for stop in ends] == [StopKind.STOPPED]
        vm.change_paging(other)
        assert vm.go(budget=10).kind is StopKind.BUDGET
