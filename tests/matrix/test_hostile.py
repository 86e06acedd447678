"""Guests that do their worst: each is reported or goes on, and nothing else notices.

What: random bytes as a kernel, memory that is not there, hangs and endless instructions, while
another VM of the same process computes on a thread of its own and has its results checked.
Source: none.  Invariant: every stop is one of the kinds that a guest can cause; its state can be
described; the engines agree about it.
"""

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.matrix import programs as p
from tests.matrix.lockstep import ENGINES, Pair
from understudy.execution.vmx.fields import GPR_NAMES as GPR
from understudy.guests.entry import CR0_ET, CR0_NE, CR0_PE, CR0_PG, PAGE_TABLES_GPA
from understudy.verdict import StopKind
from understudy.vm import VM

SEEDS = range(200)
BUDGET, GUEST_NS = 100_000, 10_000_000
ENDS = set(StopKind) - {StopKind.UNTIL, StopKind.WALL, StopKind.STOPPED}
JUNK, JUNK_BYTES = 0x30_0000, 0x1_0000
DIRECTORIES = PAGE_TABLES_GPA + 0x2000
CR0_WP = 1 << 16


class Neighbour(threading.Thread):
    """A VM that computes the same thing again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.ended_once = threading.Event(), threading.Event()
        self.results: set[tuple[str, int]] = set()

    def run(self) -> None:
        with VM("16M", name="neighbour") as vm:
            while not self.over.wait(0.01):
                p.start(vm, p.CHECKSUM)
                stop = vm.go()
                self.results.add((stop.kind, stop.status))
                self.ended_once.set()


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Neighbour]:
    thread = Neighbour()
    thread.start()
    yield thread
    thread.over.set()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _the_neighbour_goes_on(neighbour: Neighbour) -> Iterator[None]:
    yield
    neighbour.ended_once.clear()
    assert neighbour.ended_once.wait(60), "the other VM does not run any more"
    value = 0
    for _ in range(100_000):
        value = (value * 1664525 + 1013904223) & 0xFFFF_FFFF
    assert neighbour.results == {(StopKind.DEBUG_EXIT, value)}


# --- random bytes as a kernel ---

# Every exception goes to the next 64 bytes of junk, with a fresh stack.
NEXT_JUNK = """
    bc 00 00 60 00       | mov esp, 0x600000
    8b 04 25 f8 ff 5f 00 | mov eax, [0x5ffff8]
    ff c0                | inc eax
    89 04 25 f8 ff 5f 00 | mov [0x5ffff8], eax
    c1 e0 06             | shl eax, 6
    25 c0 ff 00 00       | and eax, 0xffc0
    05 00 00 30 00       | add eax, JUNK
    ff e0                | jmp rax
"""
BEGIN = """
    bc 00 00 60 00       | mov esp, 0x600000
    b8 00 00 30 00       | mov eax, JUNK
    ff e0                | jmp rax
"""
# Beginnings of instructions that reach deep into the machine.
SPICE_HEX = """
    0f00 0f01 0f0101 0f0111 0f0119 0f01c1 0f01f8 0f02 0f03 0f05 0f06 0f07 0f20 0f21 0f22c0 0f22d8
    0f22e0 0f23 0f30 0f32 0f34 0f35 0fa2 0fa8 0fa9 0fae 0faea0 0fc7 0f18 8ec0 8ed0 8ee0 8ee8 cf 48cf
    cb ca c8 9a ea cd80 cd20 cc f1 ce fa fb f4 9c 9d f3a4 f3aa f2ae 6c 6e f36e e4 e6 ec ee ed ef
    66ef f0 67 66 2e 36 64 65 dbe3 ddae dd26 d9 df 0f38 0f3a 0f6f 0fc2 c4 c5 62 ff ff18 ff28
"""
SPICE = [bytes.fromhex(code) for code in SPICE_HEX.split()]


def junk(seed: int) -> bytes:
    """Random bytes; every other seed, with much that looks like instructions for kernels."""
    chance = random.Random(seed)
    if seed % 2 == 0:
        return chance.randbytes(JUNK_BYTES)
    out = b""
    while len(out) < JUNK_BYTES:
        out += chance.choice(SPICE) + chance.randbytes(chance.randrange(5))
    return out[:JUNK_BYTES]


def random_kernel(engine: str, seed: int) -> VM:
    """Junk to execute.  One seed in four has no IDT: its first exception is its last.  Two in four
    are fenced in: what they need to go on is read-only, and nothing but RAM is mapped.
    """
    vm = VM("16M", engine=engine)
    vm.memory.write(JUNK, junk(seed))
    chance = random.Random(seed)
    start = {name: chance.getrandbits(chance.choice((23, 23, 64))) for name in GPR}
    if seed % 4:
        for vector in range(256):
            start |= p.handle(vm, vector, NEXT_JUNK)
    if seed % 4 >= 2:
        start["cr0"] = CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_PE
    p.start(vm, BEGIN, **start)
    if seed % 4 >= 2:
        pages = [n << 21 | 0x83 if n else 0x81 for n in range(8)]
        tables = b"".join(page.to_bytes(8, "little") for page in pages)
        vm.memory.write(DIRECTORIES, tables.ljust(4 << 12, b"\0"))
    return vm


def check_both_engines(make: Callable[[str], VM]) -> None:
    """A hostile guest ends in a way that there is, the same on both engines."""
    pair = Pair.of(make)
    try:
        # A repeated string instruction counts once however long it takes, so time is limited too.
        pair.step(BUDGET, deadline_ns=GUEST_NS, wall_seconds=10)
        assert set(pair.stops) <= ENDS | {StopKind.WALL}, pair.difference()
        if StopKind.WALL not in pair.stops:
            assert pair.agrees(with_memory=True), pair.difference()
        for vm in (pair.dbt, pair.reference):
            assert "rip=" in vm.describe()
    finally:
        pair.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes_as_a_kernel(seed: int) -> None:
    check_both_engines(lambda engine: random_kernel(engine, seed))


# --- hangs and endless instructions ---


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hang_with_interrupts_off(engine: str) -> None:
    """Each limit ends it, and the state says where it hangs."""
    with VM("16M", engine=engine) as vm:
        p.start(vm, p.SPIN)
        now = vm.clock.now()
        for stop in (
            vm.go(deadline_ns=now + 100_000, wall_seconds=60),
            vm.go(wall_seconds=0.05),
        ):
            assert stop.kind in (StopKind.DEADLINE, StopKind.WALL), stop
            text = vm.describe()
            assert f"rip={p.CODE + 1:016x}" in text
            assert "jmp" in text
            assert "IF" not in text.partition("rflags=")[2].splitlines()[0]


REPEAT = {
    "lodsb": "f3 ac",
    "scasb": "f2 ae",
    "stosq": "f3 48 ab",
    "movsb": "f3 a4",
    "cmpsb": "f3 a6",
}
FAR, COUNT = 1 << 39, 1 << 43


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("instruction", REPEAT)
def test_an_endless_string_instruction(engine: str, instruction: str) -> None:
    """It would take days: limits of time end it between two elements, and it can go on."""
    with VM("16M", engine=engine) as vm:
        from_to = {"rsi": FAR, "rdi": FAR + 8 * 0x1000, "rcx": COUNT, "rax": 0}
        if instruction == "scasb":
            from_to["rax"] = 1
        p.start(vm, REPEAT[instruction] + " | forever", **from_to)
        alias_everything(vm)
        before = COUNT
        for _ in range(3):
            assert vm.go(wall_seconds=0.05).kind == StopKind.WALL
            left = vm.processors[0].gpr(1)
            assert 0 < left < before
            moved = (COUNT - left) * (8 if instruction == "stosq" else 1)
            if instruction not in ("scasb", "stosq"):
                assert vm.processors[0].gpr(6) == FAR + moved
            if instruction != "lodsb":
                assert vm.processors[0].gpr(7) == FAR + 8 * 0x1000 + moved
            assert f"rip={p.CODE:016x}" in vm.describe()
            before = left


def alias_everything(vm: VM) -> None:
    """Map all from FAR on to the same 2 MBytes, full of zeros, at 4 MBytes."""
    pdpt, directory, page = 0x20_0000, 0x20_1000, 0x40_0000
    vm.memory.write(pdpt, (directory | 3).to_bytes(8, "little") * 512)
    vm.memory.write(directory, (page | 0x83).to_bytes(8, "little") * 512)
    pml4 = PAGE_TABLES_GPA
    vm.memory.write(pml4 + 8, (pdpt | 3).to_bytes(8, "little") * 255)


# --- memory that is not there ---

# Stores, a read-modify-write and a load where there is neither RAM nor a device.
STRAY = """
    bf 00 00 00 90       | mov edi, NOWHERE
    b8 78 56 34 12       | mov eax, 0x12345678
    89 07                | mov [rdi], eax
    48 89 47 08          | mov [rdi + 8], rax
    09 07                | or [rdi], eax
    8b 07                | mov eax, [rdi]
    e7 f4                | out 0xf4, eax
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_stray_accesses_read_ones_and_are_told(engine: str) -> None:
    with VM("16M", engine=engine) as vm:
        p.start(vm, STRAY)
        stop = vm.go(wall_seconds=60)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 0xFFFF_FFFF), stop
        assert "accesses that no device answered: mmio 0x90000" in vm.describe()


# A stack where nothing is: what is pushed is lost, what is popped is ones, as on a PC.
STRAY_STACK = """
    bc 00 00 00 90       | mov esp, NOWHERE
    50                   | push rax
    58                   | pop rax
    e7 f4                | out 0xf4, eax
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_stray_accesses_of_an_odd_kind_are_nothing_else(engine: str) -> None:
    with VM("16M", engine=engine) as vm:
        p.start(vm, STRAY_STACK)
        stop = vm.go(wall_seconds=60)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 0xFFFF_FFFF), stop
        assert "accesses that no device answered: mmio 0x8ffff" in vm.describe()


# --- structures that are not there ---

MOVES = {
    "stack": "bc 00 00 00 90 cc | mov esp, NOWHERE; int3",
    "IDT": "0f 01 1c 25 00 00 12 00 cc | lidt [DATA]; int3",
    "GDT": "0f 01 14 25 00 00 12 00 b8 18 00 00 00 8e d8 | lgdt [DATA]; mov eax, 0x18; mov ds, eax",
    "CR3": "b8 00 00 00 90 0f 22 d8 90 | mov eax, NOWHERE; mov cr3, rax; nop",
    "code": "b8 00 00 00 90 ff e0 | mov eax, NOWHERE; jmp rax",
    "TSS": "0f 00 d8 | ltr ax",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", MOVES)
def test_a_structure_that_is_nowhere(engine: str, what: str) -> None:
    """The guest ends, or takes the exception that a computer would; its state is told."""
    with VM("16M", engine=engine) as vm:
        idt = p.handle(vm, 3, "b0 03 e6 f4 | mov al, 3; out 0xf4, al")
        vm.memory.write(
            p.DATA, (0xFFFF).to_bytes(2, "little") + (0x9000_0000).to_bytes(8, "little")
        )
        p.start(vm, MOVES[what], **idt)
        stop = vm.go(wall_seconds=60)
        assert stop.kind in (StopKind.ERROR, StopKind.TRIPLE_FAULT), stop
        assert "cr0=CR0(PG" in stop.detail
