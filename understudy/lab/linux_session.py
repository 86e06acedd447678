"""One life of an unmodified Linux under one paging technique, counted: boot, work, power-off.

What: boots a Debian kernel with Debian's busybox, runs small loops of its shell that fork, fault
and switch between processes, and counts each.  Several experiments look at the same session.

Source: the loops are those of lmbench and of Adams and Agesen's "forkwait", as shell commands.
A loop runs once for nothing, then with n and with more rounds, and what is reported is the
difference: what starts and ends the command is in both.

Invariants: virtual time, so that every technique runs the same instructions; transparent huge pages
are off, so that a page is a page; times are reported and decide nothing.
"""

import time
from dataclasses import dataclass
from typing import Any, Final

from understudy.lab.techniques import need, since, total
from understudy.linux import VM
from understudy.silicon import Exit

MEMORY: Final = "256M"
APPEND: Final = "quiet"  # a serial console's exits would drown the others
KERNELS: Final = {"686": "IA-32", "686-pae": "PAE", "cloud-amd64": "Intel 64"}
NO_HUGE_PAGES: Final = "echo never > /sys/kernel/mm/transparent_hugepage/enabled; true"


@dataclass(frozen=True)
class Loop:
    """A shell command with a place for the number of rounds, and two such numbers."""

    command: str
    few: int
    many: int


ROUNDS: Final = "i=0; while [ $i -lt {n} ]; do %s; i=$((i+1)); done"
LOOPS: Final = {
    "nothing": Loop(ROUNDS % ":", 50, 150),
    "fork": Loop(ROUNDS % "(:)", 50, 150),
    "fault": Loop("dd if=/dev/zero of=/dev/null bs={n}k count=1 2>/dev/null", 2048, 6144),
    "switch": Loop(
        "mkdir -p /tmp; cd /tmp; rm -f a b; mkfifo a b; "
        "(while read x; do echo $x; done <a >b) & exec 3>a 4<b; "
        + ROUNDS % "echo $i >&3; read y <&4"
        + "; exec 3>&-; wait",
        50,
        150,
    ),
}
PAGES_A_ROUND: Final = {"fault": 1 / 4}  # its rounds are counted in kilobytes


class Watch:
    """How long a VM's exits are in the hypervisor's hands."""

    def __init__(self, vm: VM) -> None:
        vm.go(budget=1)  # the first entry is another instruction
        self.in_guest_s, self.entries = 0.0, 0
        execution = vm.vcpus[0].guest
        enter = execution.resume

        def resume(budget: int) -> Exit:
            begin = time.thread_time()
            exit = enter(budget)
            self.in_guest_s += time.thread_time() - begin
            self.entries += 1
            return exit

        execution.resume = resume
        self.wall_s, self.cpu_s = time.perf_counter(), time.thread_time()

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, and microseconds of the processor for each exit, outside."""
        wall, cpu = time.perf_counter() - self.wall_s, time.thread_time() - self.cpu_s
        outside = (cpu - self.in_guest_s) / max(self.entries, 1)
        self.in_guest_s, self.entries = 0.0, 0
        self.wall_s, self.cpu_s = time.perf_counter(), time.thread_time()
        return {"wall_s": round(wall, 3), "us_per_exit": round(outside * 1e6, 2)}


def session(kernel: str, paging: str) -> dict[str, Any]:
    """Boot, run the loops, power off."""
    with VM.linux(kernel, memory=MEMORY, paging=need(paging), append=APPEND) as vm:
        watch = Watch(vm)
        vm.wait_for_agent()
        out = {"boot": part(vm) | watch.lap()}
        vm.run(NO_HUGE_PAGES).check()
        for name, loop in LOOPS.items():
            vm.run(loop.command.format(n=loop.few)).check()  # what is done once is done now
            few = spend(vm, loop.command.format(n=loop.few))
            watch.lap()
            many = spend(vm, loop.command.format(n=loop.many))
            rounds = round((loop.many - loop.few) * PAGES_A_ROUND.get(name, 1))
            out[name] = {"rounds": rounds} | since(many, few) | watch.lap()
        vm.power_off()
    return out


def spend(vm: VM, command: str) -> dict[str, Any]:
    """What a command took."""
    before = part(vm)
    vm.run(command).check()
    return since(part(vm), before)


def part(vm: VM) -> dict[str, Any]:
    """Of everything counted, what the experiments ask about."""
    counts = vm.counts()
    exits = counts["exits"]
    return {
        "silicon_exits": total(vm.processors[0].counters()["exits"]),
        "kicks": counts["kicks"],
        "instructions": counts["instructions"],
        "exits": exits,
        "all_exits": total(exits),
        "faults": counts["faults"],
        "cr_accesses": counts["cr_accesses"],
        "ept_fills": counts["fills"] if counts["paging"] == "ept" else 0,
    }


def mmu_exits(found: dict[str, Any]) -> int:
    """Exits for the memory management's sake: the guest's faults, INVLPG, CR3, EPT fills.

    Accesses to devices are none of it: they exit under every technique.
    """
    faults = found["faults"]
    kinds = sum(faults[kind] for kind in ("true", "hidden", "trace"))
    drops = sum(found["exits"].get(name, 0) for name in ("INVLPG", "INVPCID"))
    return int(kinds + drops + cr3_exits(found) + found["ept_fills"])


def cr3_exits(found: dict[str, Any]) -> int:
    """Exits because the guest loads or reads CR3."""
    return sum(n for name, n in found["cr_accesses"].items() if name.startswith("CR3"))


LOOP_COLUMNS: Final = (
    "kernel", "paging", "instructions", "true_faults", "hidden_faults", "trace_faults", "cr3_exits",
    "invlpg_exits", "mmu_exits", "us_per_exit",
)  # fmt: skip


def loop_row(values: dict[str, Any], loop: str) -> dict[str, Any]:
    """What one round of a loop took."""
    found = values[loop]
    rounds = found["rounds"]
    faults = found["faults"]
    return {
        "instructions": found["instructions"],
        "true_faults": faults["true"] / rounds,
        "hidden_faults": faults["hidden"] / rounds,
        "trace_faults": faults["trace"] / rounds,
        "cr3_exits": cr3_exits(found) / rounds,
        "invlpg_exits": found["exits"].get("INVLPG", 0) / rounds,
        "mmu_exits": mmu_exits(found) / rounds,
        "idle_mmu_exits": mmu_exits(values["nothing"]) / values["nothing"]["rounds"],
        "us_per_exit": found["us_per_exit"],
    }
