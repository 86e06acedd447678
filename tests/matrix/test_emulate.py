"""The interpreter does exactly what the processor does.

What: the same guest interpreted and in VMX operation on the reference engine; after every so many
instructions all registers, what was retired and the TSC are the same.  Source: none.
Invariant: the interpreter's share is asserted, so that a comparison of the processor with itself
does not pass for one.
"""

import threading
from collections import Counter
from collections.abc import Callable

import pytest

from tests.frame_owner import FrameOwner
from tests.matrix import programs as p
from tests.matrix import test_real_mode as real_mode
from tests.matrix.beside_vmx import seen, together
from tests.matrix.lockstep import linux, memory_hash
from understudy.execution.emulate import Emulate
from understudy.guests.entry import Entry
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind
from understudy.vm import VM

SYSTEM = {
    "CPUID", "MOV", "RDMSR", "WRMSR", "LIDT", "LGDT", "LLDT", "LTR", "IN", "OUT", "HLT", "INVLPG",
}  # fmt: skip
ENDS = (StopKind.BUDGET, StopKind.DEBUG_EXIT, StopKind.POWEROFF)


def agree(make: Callable[[str], VM], step: int, most: int) -> tuple[str, int, Counter[str]]:
    """Run both; how they ended, and how much was interpreted, and handed to the processor."""
    with make("emulate") as one, make("vmx") as other:
        guest = one.vcpus[0].guest
        assert isinstance(guest, Emulate)
        stop = together(one, other, step, most)
        assert stop in ENDS
        return stop, guest.interpreted, Counter(guest.handed_over)


def small(program: str, **handlers: str) -> Callable[[str], VM]:
    def make(execution: str) -> VM:
        vm = VM("16M", execution=execution, engine="reference")
        registers: dict[str, int] = {}
        for vector, code in handlers.items():
            registers |= p.handle(vm, int(vector[1:], 16), code)
        p.start(vm, program, **registers)
        return vm

    return make


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_line_is_printed(step: int) -> None:
    stop, interpreted, handed_over = agree(small(p.HELLO), step, 1000)
    assert stop == StopKind.DEBUG_EXIT
    assert set(handed_over) <= {"OUT"}
    assert interpreted >= 16


@pytest.mark.parametrize("step", [1, 7])
def test_a_timer_interrupts(step: int) -> None:
    stop, interpreted, handed_over = agree(small(p.PIT, v20=p.PIT_HANDLER), step, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert interpreted > 0
    assert set(handed_over) <= {"OUT", "HLT"}  # what exits; the interrupt and its IRET do not


def test_the_built_in_guest() -> None:
    def make(execution: str) -> VM:
        return LinuxVM.linux("hello", execution=execution, engine="reference")

    stop, interpreted, handed_over = agree(make, 1, 100_000)
    assert stop == StopKind.POWEROFF
    assert set(handed_over) <= {"IN", "OUT"}
    assert interpreted > handed_over.total()


@pytest.mark.parametrize("step", [1, 50])
def test_from_mode_to_mode(step: int) -> None:
    """Real-address mode, protected mode of 16 and 32 bits, paging, and back, again and again."""

    def make(execution: str) -> VM:
        vm = VM("16M", execution=execution, engine="reference")
        real_mode.lay(vm, 20)
        vm.enter(Entry(real_mode.REAL, "test"))
        return vm

    stop, interpreted, handed_over = agree(make, step, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert set(handed_over) <= {"LGDT", "MOV", "OUT"}  # MOV to and from CR
    assert interpreted > handed_over.total()


REMAP = """
    8b 07                | mov eax, [rdi]
    48 89 16             | mov [rsi], rdx
    0f 01 3f             | invlpg [rdi]
    8b 1f                | mov ebx, [rdi]
    41 8b 08             | mov ecx, [r8]
    e6 f4                | out 0xf4, al
"""


def test_an_entry_is_used_until_invlpg() -> None:
    """A page of 2 MBytes leads elsewhere; what else is kept of it goes too, elsewhere in it."""

    def make(execution: str) -> VM:
        vm = VM("16M", execution=execution, engine="reference")
        directory, page = 0x4000, 4 << 20
        for at, value in ((page, 1), (page + 0x5000, 2), (6 << 20, 3), ((6 << 20) + 0x5000, 4)):
            vm.memory.write(at, bytes((value,)))
        p.start(vm, REMAP, rdi=page, rsi=directory + 16, rdx=6 << 20 | 0x83, r8=page + 0x5000)
        return vm

    stop, _, handed_over = agree(make, 1, 100)
    assert stop == StopKind.DEBUG_EXIT
    assert set(handed_over) == {"OUT"}
    with make("emulate") as vm:
        vm.memory.write(p.CODE, bytes.fromhex("41 8b 08") + p.assemble(REMAP))
        vm.go()
        found = vm.vcpus[0].registers()
        assert [found[name] for name in ("rax", "rbx", "rcx")] == [1, 3, 4]


ITSELF = """
    8b 1e                | mov ebx, [rsi]
    88 17                | mov [rdi], dl
    b0 00                | mov al, 0
    8b 0e                | mov ecx, [rsi]
    e6 f4                | out 0xf4, al
"""


@pytest.mark.parametrize("leaves", [p.CODE, 0x300000])
def test_code_that_writes_itself_may_have_to_move_first(leaves: int) -> None:
    """Its frame becomes a copy; or another is missed, for which it has to leave."""
    data = 0x300000
    with VM("16M", execution="emulate", engine="reference") as vm:
        p.start(vm, ITSELF, rdi=p.CODE + 5, rsi=data, rdx=7)
        vm.memory.write(data, b"\x2a")
        p2m, host = vm.memory.p2m, vm.host

        def move(gfn: int) -> None:
            old = p2m.lookup(gfn) or kept
            new = host.frame() >> 12
            host.memory.write(new << 12, host.memory.read(old << 12, 4096))
            p2m.map(gfn, new, 1)

        def bring(gfn: int) -> None:
            move(gfn)
            if gfn == data >> 12:
                move(p.CODE >> 12)

        kept = p2m.lookup(data >> 12) or 0
        FrameOwner(move, bring).own(p2m)
        if leaves == data:
            p2m.take(data >> 12, 1)
        else:
            p2m.protect(leaves >> 12)
        vm.go()
        found = vm.vcpus[0].registers()
        assert [found[name] & 0xFF for name in ("rax", "rbx", "rcx")] == [7, 0x2A, 0x2A]


def test_it_walks_the_guests_own_tables() -> None:
    """No shadow paging goes with it, from the start or later, and that is said in one line."""
    with pytest.raises(
        ValueError, match="paging with execution emulate 'vtlb': expected one of ept"
    ):
        VM("16M", execution="emulate", paging="vtlb")
    with VM("16M", execution="emulate") as vm:
        p.start(vm, p.HELLO)
        with pytest.raises(ValueError, match="'lazy': expected one of ept"):
            vm.change_paging("lazy")
        assert vm.go().status == 42


def test_in_real_time_its_processors_take_turns() -> None:
    """A locked instruction reads and writes in two steps, between which no other may come."""
    threads: set[str] = set()
    with VM("16M", execution="emulate", cpus=2, clock="wall") as vm:
        p.start(vm, p.HELLO)
        vm.console.on_output.append(
            lambda data: threads.update(thread.name for thread in threading.enumerate())
        )
        assert vm.go().status == 42
    assert threads
    assert not [name for name in threads if name.startswith("vCPU")]


def test_a_copy_goes_on() -> None:
    """A snapshot in the middle: the copy ends as its original does, counts included."""
    with small(p.PIT, v20=p.PIT_HANDLER)("emulate") as vm:
        assert vm.go(budget=20).kind == StopKind.BUDGET
        with VM.restore(vm.save()) as copy:
            for one in (vm, copy):
                assert one.go().kind == StopKind.DEBUG_EXIT
            assert seen(copy) == seen(vm)


@pytest.mark.real_guest
@pytest.mark.parametrize(("guest", "most"), [("cloud-amd64", 60_000), ("686", 60_000)])
def test_the_beginning_of_linux(guest: str, most: int) -> None:
    def make(execution: str) -> VM:
        return LinuxVM.linux(guest, execution=execution, engine="reference")

    linux(guest=guest).close()  # skips where there is none
    _, interpreted, handed_over = agree(make, 100, most)
    assert interpreted > 100 * handed_over.total()
    assert set(handed_over) <= SYSTEM


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_million_instructions_of_linux() -> None:
    """In few steps: a comparison needs the processor to stop."""

    def make(execution: str) -> VM:
        return LinuxVM.linux("cloud-amd64", execution=execution)

    linux(guest="cloud-amd64").close()  # skips where there is none
    with make("emulate") as one, make("vmx") as other:
        guest = one.vcpus[0].guest
        assert isinstance(guest, Emulate)
        assert together(one, other, 2_000_000, 20_000_000) is StopKind.BUDGET
        assert memory_hash(one) == memory_hash(other)
        assert guest.interpreted > 100 * guest.handed_over.total()
