"""What the processors of one host share, and who may clear it: nobody undoes another's.

What: marks of code and reports of writes over it, frames of clones, dirty logs, translations; each
with two VMs of one host that take turns, in both engines and under each technique.
Source: docs/decisions/0011-a-mark-belongs-to-its-holder.md, whose table it follows; two processors
on one memory: silicon/src/code_tests.rs.
Invariant: what a VM does here does not depend on what the other one has done.
"""

import pytest

from tests.matrix.programs import assemble, start
from understudy.machine.dirty_log import DirtyLog
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

FUNCTION = 0x12_0000
ENGINES = ("dbt", "reference")
TECHNIQUES = sorted(Paging.ALL)

# Often enough that it is translated, and then what the function gives: for ever.
CALLS = """
    b9 d0 07 00 00       | next: mov ecx, 2000
    bb 00 00 12 00       | mov ebx, FUNCTION
    ff d3                | again: call rbx
    e2 fc                | loop again
    e6 f4                | out 0xf4, al
    eb ee                | jmp next
"""
# The same, but before each round it writes the function anew: RDI is what it is to give.
REWRITES = """
    89 3c 25 01 00 12 00 | next: mov [FUNCTION + 1], edi
    b9 d0 07 00 00       | mov ecx, 2000
    bb 00 00 12 00       | mov ebx, FUNCTION
    ff d3                | again: call rbx
    e2 fc                | loop again
    e6 f4                | out 0xf4, al
    ff c7                | inc edi
    eb e5                | jmp next
"""


def gives(value: int) -> bytes:
    """A function that returns this."""
    return assemble("b8") + value.to_bytes(4, "little") + assemble("c3")


def answer(vm: VM) -> int:
    """What the next round of a VM comes to."""
    stop = vm.go(budget=100_000)
    assert stop.kind is StopKind.DEBUG_EXIT, stop
    return stop.status


def made(host: Host, program: str, value: int, **options: str) -> VM:
    """A VM whose function gives this at first."""
    vm = VM("4M", host=host, **options)
    vm.memory.write(FUNCTION, gives(value))
    start(vm, program, rdi=value)
    return vm


@pytest.mark.parametrize("paging", TECHNIQUES)
@pytest.mark.parametrize("engine", ENGINES)
def test_marks_of_code(engine: str, paging: str) -> None:
    """The hypervisor writes over a VM's code; then the other one runs, and drops its own."""
    with Host("64M") as host:
        first = made(host, CALLS, 1, engine=engine, paging=paging)
        second = made(host, REWRITES, 100, engine=engine, paging=paging)
        for value in range(1, 6):
            first.memory.write(FUNCTION, gives(value))
            assert answer(second) == 100 + value - 1
            assert answer(first) == value
            assert answer(first) == value
        with VM("4M", host=host, engine=engine, paging=paging) as later:  # replays nothing
            later.memory.write(FUNCTION, gives(77))
            start(later, CALLS)
            assert answer(later) == 77
        assert answer(first) == 5


@pytest.mark.parametrize("paging", TECHNIQUES)
@pytest.mark.parametrize("engine", ENGINES)
def test_code_in_frames_that_clones_share(engine: str, paging: str) -> None:
    """One of them writes over it, and gets a copy; the others execute what was there."""
    with Host("128M") as host:
        origin = made(host, CALLS, 7, engine=engine, paging=paging)
        assert answer(origin) == 7
        with origin.snapshot() as image:
            writer, reader = image.fork(2)
        assert [answer(one) for one in (writer, reader)] == [7, 7]
        for value in (8, 9):
            writer.memory.write(FUNCTION, gives(value))
            assert [answer(one) for one in (reader, writer, origin)] == [7, value, 7]
        start(writer, REWRITES, rdi=20)
        for value in (20, 21):
            assert [answer(one) for one in (writer, reader, origin)] == [value, 7, 7]
        for one in (writer, reader, origin):
            one.close()


STORES = """
    89 07                | next: mov [rdi], eax
    81 c7 00 10 00 00    | add edi, 4096
    e6 f4                | out 0xf4, al
    eb f4                | jmp next
"""


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_dirty_logs(paging: str) -> None:
    """Each VM's says what it has written, whoever asks for the other's."""
    with Host("128M") as host:
        vm = VM("4M", host=host, paging=paging)
        start(vm, STORES, rdi=0x20_0000)
        with vm.snapshot() as image:
            (clone,) = image.fork()
        logs = [DirtyLog(one.memory.p2m) for one in (vm, clone)]
        for log in logs:
            log.start()
        answer(vm), answer(clone), answer(clone)
        assert [gfn for gfn in logs[0].take() if gfn >= 0x200] == [0x200]
        answer(vm)
        assert [gfn for gfn in logs[1].take() if gfn >= 0x200] == [0x200, 0x201]
        assert [gfn for gfn in logs[1].take() if gfn >= 0x200] == []
        assert [gfn for gfn in logs[0].take() if gfn >= 0x200] == [0x201]
        clone.close()
        vm.close()


REMAPS = """
    8b 07                | next: mov eax, [rdi]
    e6 f4                | out 0xf4, al
    89 1e                | mov [rsi], ebx          ; the page's entry
    0f 01 3f             | invlpg [rdi]
    8b 07                | mov eax, [rdi]
    e6 f4                | out 0xf4, al
    eb fe                | jmp $
"""


@pytest.mark.parametrize("paging", TECHNIQUES)
@pytest.mark.parametrize("engine", ENGINES)
def test_translations(engine: str, paging: str) -> None:
    """Two VMs with the same addresses: one drops a translation, the other keeps its own."""
    with Host("128M") as host:
        vms = []
        for value in (1, 2):
            vm = VM("4M", host=host, engine=engine, paging=paging)
            directory = 0x4000  # of the first gigabyte, in the loader's tables
            vm.memory.write(0x20_0000, bytes([value]))
            vm.memory.write(0x0, bytes([value + 10]))
            start(vm, REMAPS, rdi=0x20_0000, rsi=directory + 8, rbx=0x83)
            assert vm.memory.read_u64(directory + 8) == 0x20_0083
            vms.append(vm)
        first, second = vms
        assert [answer(first), answer(second)] == [1, 2]
        assert answer(first) == 11
        assert second.memory.read_u64(0x4008) & ~0x60 == 0x20_0083
        assert answer(second) == 12
