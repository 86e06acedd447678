"""Interrupts that wait for their VM's next turn cost a switch for each turn, not one for each.

Claim: a VM that sleeps until a packet comes shares a pCPU with one that computes. If it gets the
pCPU with each interrupt, there is a switch to it for every interrupt. If interrupts wait until the
quantum of the other is over, there is one for every quantum in which some came, however many; what
that costs is that an interrupt waits for a quantum.

Source: Whitaker, Shaw, Gribble, "Scale and Performance in the Denali Isolation Kernel" (2002),
"Asynchronous, batched interrupts": "delivered in batch, to reduce context switches".

Control: with no more than one interrupt in a quantum, batches save nothing; and the count of
batches does not hold for interrupts that do not wait.

Note: quanta of 5 ms from the beginning of time on, 200 ms, interrupts at even distances, each for
a packet that a device has counted. `switched_to` is how often the pCPU went from the other to the
VM; `expected` is made of the times of the packets alone.
"""

import struct
from typing import TYPE_CHECKING, Any, Final

from understudy.devices.message import Message
from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, control, every
from understudy.lab.spinners import CODE, run_for, spinning
from understudy.linux import VM
from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import Policy
from understudy.sched.seat import Seat
from understudy.turns import TURN_NS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MS: Final = 1_000_000
BITS: Final = 64  # of the code
QUANTUM_NS: Final = 5 * MS
SPAN_NS: Final = 200 * MS
IDT, HANDLER, PACKETS, VECTOR = 0x11_0000, 0x11_2000, 0x12_0000, 0x40
MAIN: Final = (
    ("b0 ff", "mov al,0FFh"),
    ("e6 21", "out 21h,al; no interrupts of the 8259"),
    ("fb", "sti"),
    ("f4", "hlt"),
    ("eb fd", "jmp -1"),
)
ISR: Final = (
    ("8b 1f", "mov ebx,[rdi]; all packets that have come"),
    ("ff c5", "inc ebp"),
    ("31 c0", "xor eax,eax"),
    ("31 d2", "xor edx,edx"),
    ("b9 0b 08 00 00", "mov ecx,80Bh; EOI"),
    ("0f 30", "wrmsr"),
    ("48 cf", "iretq"),
)


class Quanta(Policy, name="whole-quanta"):
    """Round robin; at once: who wakes has the pCPU at the next boundary, else when a quantum ends.

    Who has slept goes before who has not.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.woken: list[Seat] = []
        self.rest: list[Seat] = []
        self.began: dict[Seat, int] = {}

    def wake(self, seat: Seat, now: int) -> Pcpu | None:
        self.woken.append(seat)
        return self.pcpus[0] if self.at_once else None

    def block(self, seat: Seat, now: int) -> None:
        for queue in (self.woken, self.rest):
            if seat in queue:
                queue.remove(seat)

    def tick(self, pcpu: Pcpu, seat: Seat, now: int, asked: bool) -> bool:
        is_over = now // QUANTUM_NS > self.began[seat] // QUANTUM_NS
        if is_over:
            self.began[seat] = now
        if not (self.woken or self.rest) or not (is_over or asked):
            return False
        self.rest.append(seat)
        return True

    def pick(self, pcpu: Pcpu, now: int) -> Seat | None:
        queue = self.woken or self.rest
        if not queue:
            return None
        seat = queue.pop(0)
        self.began[seat] = now
        return seat


def listening(host: Host) -> VM:
    """A VM that sleeps, and looks at each interrupt how many packets there are."""
    vm = host.vm("2M", name="listens")
    for at, program in ((CODE, MAIN), (HANDLER, ISR)):
        vm.memory.write(at, b"".join(bytes.fromhex(row) for row, _ in program))
    gate = struct.pack("<HHBBHII", HANDLER & 0xFFFF, 0x10, 0, 0x8E, HANDLER >> 16, 0, 0)
    vm.memory.write(IDT + VECTOR * 16, gate)
    write_gdt(vm.memory, CODE_64)
    vm.enter(long_mode(
        vm.memory, "listen", CODE, rdi=PACKETS, rsp=0x18_0000, idtr_base=IDT, idtr_limit=0xFFF,
    ))  # fmt: skip
    msrs = vm.vcpus[0].msrs
    msrs.write(0x1B, 0xFEE0_0D00)  # x2APIC mode
    msrs.write(0x80F, 0x1FF)  # on
    return vm


def arrivals(interval_us: int) -> list[int]:
    """When packets come, after the beginning: in the middle of turns."""
    return list(range(QUANTUM_NS + TURN_NS // 2, SPAN_NS - QUANTUM_NS, interval_us * 1000))


def measure(batched: bool, interval_us: int) -> dict[str, Any]:
    """Packets, interrupts taken, switches."""
    with Host(pcpus=1, ram="64M", policy=Quanta(at_once=not batched)) as host:
        vm, other = listening(host), spinning(host, "computes")
        clock, came = vm.clock, 0

        def packet() -> None:
            nonlocal came
            came += 1
            vm.memory.write(PACKETS, struct.pack("<I", came))
            vm.interrupts.deliver(Message(VECTOR, 0))

        for at in arrivals(interval_us):
            clock.at(at, packet)
        run_for(host, SPAN_NS)
        registers, counts = vm.vcpus[0].registers(), vm.counts()["scheduling"][0]
        found = {
            "packets": came, "seen": registers["rbx"], "taken": registers["rbp"],
            "switched_to": sum(counts["switches"].values()) - 1,  # and once to begin with
            "longest_wait": counts["longest_wait_ns"], "expected": expected(batched, interval_us),
        }  # fmt: skip
        vm.close()
        other.close()
    return found


def expected(batched: bool, interval_us: int) -> int:
    """Switches to the VM: turns, or quanta, in which a packet came."""
    span = QUANTUM_NS if batched else TURN_NS
    return len({at // span for at in arrivals(interval_us)})


def name(row: Row) -> str:
    """A row in words."""
    return f"every {row['interval_us']} us, {'batched' if row['batched'] else 'at once'}"


def check(table: Table) -> list[Bar]:
    """Exact."""
    batched, immediate = table.where(batched=True), table.where(batched=False)
    quanta = {row["interval_us"]: row["switched_to"] for row in batched}
    often = [row for row in immediate if row["interval_us"] * 1000 < QUANTUM_NS]
    seldom = [row for row in immediate if row["interval_us"] * 1000 >= QUANTUM_NS]
    return [
        every("at once: a switch for each interrupt", immediate,
              lambda r: r["switched_to"], lambda r: r["packets"], name=name),
        every("batched: one for each quantum in which some came", batched,
              lambda r: r["switched_to"], lambda r: r["expected"], name=name),
        every("no packet is lost, and each switch is for some", table.rows,
              lambda r: (r["seen"], r["taken"]), lambda r: (r["packets"], r["switched_to"]),
              name=name),
        every("an interrupt waits for a turn at most, batched for a quantum", table.rows,
              lambda r: r["longest_wait"] <= (QUANTUM_NS if r["batched"] else TURN_NS),
              lambda r: True, name=name),
        control("interrupts at once are not as few as quanta", every(
              "", often, lambda r: r["switched_to"], lambda r: quanta.get(r["interval_us"]),
              name=name)),
        absent(every("one in a quantum at most: batches save nothing", seldom,
              lambda r: r["switched_to"], lambda r: quanta.get(r["interval_us"]), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Switches over the distance of interrupts."""
    from understudy.lab.figure import lines, series

    points = series(table.rows, "batched", "interval_us", "switched_to")
    lines(figure.add_subplot(), points, "us between interrupts", "switches")


EXPERIMENT = Experiment(
    measure=measure,
    guest="a VM that sleeps until an interrupt comes, and one that computes, on one pCPU",
    sweep={"batched": [False, True], "interval_us": [100, 250, 1000, 2500, 5000, 10_000]},
    quick={"interval_us": [250, 1000, 10_000]},
    slide=12,
    check=check,
    draw=draw,
)
