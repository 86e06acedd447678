"""Two VMs of one host that rewrite their code while the other runs: neither notices.

What: random kernel code that writes over its own functions in every way that there is (stores,
another address of the same page, REP MOVS, INS, an instruction right before), and a hypervisor
that does; in turns of random length or at once, under random techniques, now and then with clones,
which share the code's frames, or with a VM that ends and another that gets its frames.  Beside each
runs a twin, alone on a host of its own, in the reference engine, which translates nothing.
Source: docs/decisions/0011-a-mark-belongs-to-its-holder.md.
Invariant: after each turn registers and counts are the same as the twin's, at the end memory, too.
"""

import random
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from tests.matrix.programs import CODE, handle, start
from tests.walls.campaigns import Round, part
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.verdict import Stop
from understudy.vm import VM

TECHNIQUES = sorted(Paging.ALL)
FUNCTIONS, FUNCTION_BYTES = 0x12_0FC0, 32  # the third lies at the border of two pages
COUNT, BODY = 6, 24
MOST = 4  # VMs
ALIAS = 1 << 30  # the first 2 MBytes again
SECOND_GIGABYTE = PAGE_TABLES_GPA + 0x3000
GUEST_NS = 3_000_000
# An exception begins the program again, one instruction later each time.
AGAIN = """
    bc 00 00 20 00       | mov esp, 0x200000
    41 ff c7             | inc r15d
    31 c0                | xor eax, eax
    b9 00 00 10 00       | mov ecx, CODE
    ff e1                | jmp rcx
"""
OPERATIONS = (0xB8, 0x05, 0x35, 0x2D, 0x0D, 0x25, 0x3D)  # of EAX with 32 bits
LAST = (b"\xc3", b"\xc3", b"\xc3", b"\x90\xc3", b"\xff\xc3\xc3", b"\x0f\xc8\xc3", b"\xf4")


def function(chance: random.Random) -> bytes:
    """Some operations on EAX with immediate values, and a return."""
    body = b""
    for _ in range(chance.randrange(1, 4)):
        body += bytes([chance.choice(OPERATIONS)]) + chance.randbytes(4)
    return body + chance.choice(LAST)


def place(chance: random.Random) -> int:
    """Where a function begins."""
    return FUNCTIONS + FUNCTION_BYTES * chance.randrange(COUNT)


def program(chance: random.Random) -> bytes:
    """Calls and rewrites, for ever."""
    out = b""
    for _ in range(chance.randrange(3, 25)):
        out += _piece(chance, CODE + len(out))
    return out + b"\xe9" + struct.pack("<i", -len(out) - 5)


def _piece(chance: random.Random, at: int) -> bytes:
    to, by = place(chance), chance.choice((0, 0, ALIAS))
    word, near = chance.randbytes(4), chance.choice((1, 1, 6, 11, chance.randrange(BODY)))
    match chance.randrange(11):
        case 0 | 1:
            return _call(at, to)
        case 2:  # often enough to be translated
            again = b"\xb9" + struct.pack("<I", chance.choice((3, 40, 300)))
            call = _call(at + len(again), to)
            return again + b"\x51" + _call(at + len(again) + 1, to) + b"\x59\xe2" + bytes(
                [256 - len(call) - 4])  # fmt: skip
        case 3:  # mov dword [function + near], word
            return b"\xc7\x04\x25" + struct.pack("<I", to + by + near) + word
        case 4:  # the number of the round: another value each time
            return b"\x44\x89\x3c\x25" + struct.pack("<I", to + by + 1) + b"\x41\xff\xc7"
        case 5:  # another operation
            code = chance.choice(OPERATIONS)
            return b"\xc6\x04\x25" + struct.pack("<I", to + by) + bytes([code])
        case 6:  # one function becomes another
            moves = (
                b"\xbe" + struct.pack("<I", place(chance)) + b"\xbf" + struct.pack("<I", to + by)
            )
            return moves + b"\xb9" + struct.pack("<I", FUNCTION_BYTES) + b"\xf3\xa4"
        case 7:  # the next instruction, mov ebx, word
            return b"\xc7\x05\x01\0\0\0" + word + b"\xbb" + chance.randbytes(4)
        case 8:  # INS beside the code, or over it
            where = chance.choice((0x12_0800, 0x12_1800, to + BODY, to + 1))
            port = b"\x66\xba" + struct.pack("<H", chance.choice((0x9990, 0x71, 0x3FF)))
            return port + b"\xbf" + struct.pack("<I", where + by) + b"\x6c"
        case 9:  # loads of CR3 and INVLPG
            flush = b"\x0f\x20\xd9\x0f\x22\xd9"
            return chance.choice((flush, b"\x0f\x01\x3c\x25" + struct.pack("<I", to + by)))
        case _:  # atomically
            return b"\xf0\x44\x01\x3c\x25" + struct.pack("<I", to + by + near)


def _call(at: int, to: int) -> bytes:
    return b"\xe8" + struct.pack("<i", to - at - 5)


def load(vm: VM, seed: int) -> None:
    """A random program with its functions."""
    chance = random.Random(seed)
    registers: dict[str, int] = {"rax": 1}
    for vector in range(32):
        registers |= handle(vm, vector, AGAIN)
    start(vm, "", **registers)
    for n in range(COUNT):
        vm.memory.write(FUNCTIONS + n * FUNCTION_BYTES, function(chance))
    vm.memory.write(CODE, program(chance))
    vm.memory.write_u64(SECOND_GIGABYTE, 0x83)


class Twins:
    """A VM on a host that others share, and its like."""

    def __init__(self, ours: VM, alone: VM) -> None:
        self.both = ours, alone

    @classmethod
    def of(cls, host: Host, paging: str, seed: int) -> "Twins":
        """Both with the same program."""
        engines = ("dbt", host), ("reference", None)
        twins = cls(*(VM("4M", engine=engine, host=on, paging=paging) for engine, on in engines))
        for vm in twins.both:
            load(vm, seed)
        return twins

    def clone(self) -> "Twins":
        """Clones of both, beside them."""
        clones = []
        for vm in self.both:
            with vm.snapshot() as image:
                clones.append(image.restore(host=vm.host))
        return Twins(*clones)

    def write(self, gpa: int, data: bytes) -> None:
        """The hypervisor writes."""
        for vm in self.both:
            vm.memory.write(gpa, data)

    def go(self, budget: int) -> None:
        """One turn."""
        self.compare(self.run(0, budget), budget)

    def run(self, which: int, budget: int) -> Stop:
        """One of them, for a turn."""
        vm = self.both[which]
        return vm.go(budget=budget, deadline_ns=vm.clock.now() + GUEST_NS)

    def compare(self, ours: Stop, budget: int) -> None:
        """The other one comes after, and is where the first one is."""
        ends = ours, self.run(1, budget)
        one, other = (_seen(vm, end) for vm, end in zip(self.both, ends, strict=True))
        assert one == other, {key: (one[key], other[key]) for key in one if one[key] != other[key]}

    def compare_memory(self) -> None:
        """All of it."""
        one, other = (vm.memory.read(0, vm.memory.size) for vm in self.both)
        where = (at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        assert one == other, f"the memories differ from {next(where):#x} on"

    def close(self) -> None:
        """Both end."""
        for vm in self.both:
            vm.close()


def _seen(vm: VM, stop: Stop) -> dict[str, Any]:
    registers = vm.vcpus[0].registers()
    return registers | {"stop": stop.kind, "instructions": vm.instructions, "now": vm.clock.now()}


@part(rounds=25)
def neighbors() -> Iterator[Round]:
    """Turns of two to four VMs."""
    with Host("256M") as host:
        free = host.frames.free_count

        def one(chance: random.Random) -> None:
            with ExitStack() as stack:

                def add(twins: Twins) -> Twins:
                    stack.callback(twins.close)
                    return twins

                vms = [add(Twins.of(host, chance.choice(TECHNIQUES), chance.getrandbits(32)))
                       for _ in range(2)]  # fmt: skip
                for _ in range(chance.randrange(4, 16)):
                    number = chance.randrange(len(vms))
                    twins, wish = vms[number], chance.randrange(12)
                    if wish < 3:
                        twins.write(place(chance), function(chance))
                    elif wish == 3 and len(vms) < MOST:
                        vms.append(add(twins.clone()))
                    elif wish == 4:  # its frames are another's soon
                        vms[number] = add(
                            Twins.of(host, chance.choice(TECHNIQUES), chance.getrandbits(32))
                        )
                        twins.close()
                    vms[number].go(chance.choice((1, 7, 300, 3000)))
                for twins in vms:
                    twins.go(500)
                    twins.compare_memory()
            assert (host.frames.free_count, host.processors) == (free, [])

        yield one


@part(rounds=10)
def neighbors_at_once() -> Iterator[Round]:
    """Turns of two to four VMs, all at the same time, each on a thread."""
    with Host("256M") as host, ThreadPoolExecutor(MOST) as pool:
        free = host.frames.free_count

        def one(chance: random.Random) -> None:
            with ExitStack() as stack:
                vms = [Twins.of(host, chance.choice(TECHNIQUES), chance.getrandbits(32))
                       for _ in range(2)]  # fmt: skip
                if chance.random() < 0.5:
                    vms += [twins.clone() for twins in vms]
                for twins in vms:
                    stack.callback(twins.close)
                for _ in range(chance.randrange(2, 8)):
                    budgets = [chance.choice((300, 3000, 20_000)) for _ in vms]
                    ends = list(pool.map(lambda twins, n: twins.run(0, n), vms, budgets))
                    for twins, end, budget in zip(vms, ends, budgets, strict=True):
                        twins.compare(end, budget)
                for twins in vms:
                    twins.compare_memory()
            assert (host.frames.free_count, host.processors) == (free, [])

        yield one
