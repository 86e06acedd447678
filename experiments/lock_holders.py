"""A virtual processor that spins for a lock should give way to the one that holds it.

Claim: where the vCPUs of a VM share a pCPU, the holder of a lock loses the pCPU in the midst of its
critical section, and the others spin for whole slices. With exits of PAUSE loops that yield to a
sibling, the pCPU goes to the holder within 4,096 ticks, and the lock is had as often as one vCPU
alone would have it.

Source: lecture, "Scheduling: Virtual CPUs"; SDM 3C, "Instructions That Cause VM Exits
Conditionally" (PAUSE-loop exiting); Uhlig et al., "Towards Scalable Multiprocessor Virtual
Machines" (2004), lock-holder preemption.

Control: one vCPU alone never spins: no exit, and yielding changes nothing.

Note: a critical section of 2 ms, taken again at once; slices of 5 ms; 200 ms.
"""

from typing import TYPE_CHECKING, Any

from understudy.guests.entry import CODE_32, protected_mode, write_gdt
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.spinners import CODE, run_for
from understudy.vcpu.activity import Activity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MS = 1_000_000
LOCK = 0x12_0000
PROGRAM = (
    ("b8 01 00 00 00", "mov eax,1"),
    ("87 07", "xchg eax,[edi]"),
    ("85 c0", "test eax,eax"),
    ("74 09", "je +11"),
    ("f3 90", "pause"),
    ("83 3f 00", "cmp dword [edi],0"),
    ("75 f9", "jne -5"),
    ("eb ec", "jmp -18"),
    ("b9 80 84 1e 00", "mov ecx,1E8480h"),
    ("ff c9", "dec ecx"),
    ("75 fc", "jne -2"),
    ("c7 07 00 00 00 00", "mov dword [edi],0"),
    ("43", "inc ebx"),
    ("eb da", "jmp -36"),
)


def measure(vcpus: int, yields: bool) -> dict[str, Any]:
    """How often the lock was had, and what it took."""
    with Host(pcpus=1, ram="64M", yields=yields) as host, host.vm("2M", cpus=vcpus) as vm:
        vm.memory.write(CODE, b"".join(bytes.fromhex(row) for row, _ in PROGRAM))
        write_gdt(vm.memory, CODE_32)
        registers = protected_mode("lock", CODE, rdi=LOCK).registers
        for vcpu in vm.vcpus:
            vcpu.set_registers(dict(registers))
            vcpu.state.activity = Activity.ACTIVE
        run_for(host, 200 * MS)
        had = sum(vcpu.registers()["rbx"] for vcpu in vm.vcpus)
        pauses = vm.counts()["exits"].get("PAUSE", 0)
        switched = host.schedule.pcpus[0].switches
    return {"had": had, "pause_exits": pauses, "slices": switched["slice"],
            "yielded": switched["yield"]}  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['vcpus']} vCPUs, {'yielding' if row['yields'] else 'not yielding'}"


def check(table: Table) -> list[Bar]:
    """Against one vCPU alone, which has the lock every 4,000,002 ns and some."""
    alone = {row["yields"]: row["had"] for row in table.where(vcpus=1)}
    several = [row for row in table.rows if row["vcpus"] > 1]
    with_it = [row for row in several if row["yields"]]
    without = [row for row in several if not row["yields"]]
    return [
        every("without yielding, the lock is had at most two thirds as often as by one alone",
              without, lambda r: 3 * r["had"] <= 2 * alone[False] and r["pause_exits"] == 0,
              lambda r: True, name=name),
        every("with yielding, at least nine tenths as often", with_it,
              lambda r: 10 * r["had"] >= 9 * alone[True], lambda r: True, name=name),
        every("that takes exits of PAUSE loops, and switches", with_it,
              lambda r: r["pause_exits"] >= r["yielded"] > 0, lambda r: True, name=name),
        absent(every("one alone: no exit, no switch", table.where(vcpus=1),
                     lambda r: (r["pause_exits"], r["slices"], r["yielded"]),
                     lambda r: (0, 0, 0), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """How often the lock was had."""
    from understudy.lab.figure import lines, series

    points = series(table.rows, "yields", "vcpus", "had")
    lines(figure.add_subplot(), points, "vCPUs", "times")


EXPERIMENT = Experiment(
    measure=measure,
    guest="vCPUs of one VM that want one lock, on one pCPU",
    sweep={"vcpus": [1, 2, 4], "yields": [False, True]},
    slide=12,
    check=check,
    draw=draw,
)
