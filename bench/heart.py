"""What the heart of the hypervisor costs: exits, switches, changes of the p2m, clones.

Run: `python -m bench.heart`.  Each figure is the least of several short repetitions, in processor
time of the thread, so that a busy computer disturbs it little; the median stands beside it.
Source: none.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from understudy.guests.entry import Entry
from understudy.host import Host as SharedHost
from understudy.lab.spinners import run_for, spinning
from understudy.lab.spinners import switches as counted
from understudy.linux import VM as LinuxVM
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging.ept import Ept
from understudy.sched.share import Share
from understudy.turns import TURN_NS
from understudy.vm import VM

CODE, APIC_TPR = 0x10_0000, 0xFEE0_0080
LOOPS = {  # two instructions a turn, of which one exits
    "IN from the keyboard controller": "ec ebfd",
    "CPUID": "0fa2 ebfc",
    "load from the APIC's page": "8b07 ebfc",
    "store to the APIC's page": "8907 ebfc",
}
TURNS = 1000
WHILE_NS = 2_000_000
PIECES = 1 << 20


def least(action: Callable[[], object], times: int, each: int = 1) -> tuple[float, float]:
    """(least, median) microseconds of one of `each` things that an action does."""
    found = []
    for _ in range(times):
        begin = time.thread_time()
        action()
        found.append((time.thread_time() - begin) / each * 1e6)
    return min(found), statistics.median(found)


def looping(vm: VM, code: str) -> VM:
    """The VM, in 64-bit mode with its first four gigabytes as they are, in a loop."""
    memory = vm.memory
    memory.write_u64(0x1000, 0x2007)
    for n in range(4):
        memory.write_u64(0x2000 + 8 * n, 0x3007 + 0x1000 * n)
        for i in range(512):
            memory.write_u64(0x3000 + 0x1000 * n + 8 * i, (n * 512 + i) << 21 | 0xE7)
    memory.write(CODE, bytes.fromhex(code))
    registers = {"rip": CODE, "rsp": 0x8000, "rflags": 2, "cr0": 0x8001_0031, "cr3": 0x1000}
    registers |= {"cr4": 0x20, "efer": 0x500, "rdi": APIC_TPR, "rdx": 0x64}
    vm.enter(Entry(registers, "bench"))
    return vm


def exits(times: int) -> None:
    """Rows for single exits."""
    for paging in ("ept", "vtlb"):
        for name, code in LOOPS.items():
            with looping(VM("16M", paging=paging), code) as vm:
                looped(f"{name}, {paging}", vm, times)


def looped(name: str, vm: VM, times: int) -> None:
    """A row for one turn of a loop."""
    vm.go(budget=2 * TURNS)
    row(name, *least(lambda: vm.go(budget=2 * TURNS), times, TURNS))


def exits_on_a_host(times: int) -> None:
    """The first loop of `exits`, alone and as the only VM of a host, in turns.

    They run until a time, as guests do, and not for so many instructions.
    """
    name, code = next(iter(LOOPS.items()))
    with (
        SharedHost(pcpus=1, ram="64M") as host,
        looping(host.vm("16M"), code) as shared,
        looping(VM("16M"), code) as alone,
    ):
        places = {"alone": alone, "1 VM on a host": shared}
        found: dict[str, list[float]] = {place: [] for place in places}
        for _ in range(times):
            for place, vm in places.items():
                found[place].append(for_a_while(vm))
    for place, each in found.items():
        row(f"{name}, ept, for {WHILE_NS / 1e6:g} ms, {place}", min(each), statistics.median(each))


def for_a_while(vm: VM) -> float:
    """Microseconds of an exit."""
    before, began = sum(vm.vcpus[0].exits.values()), time.thread_time()
    vm.go(deadline_ns=vm.clock.now() + WHILE_NS)
    took = time.thread_time() - began
    return took / (sum(vm.vcpus[0].exits.values()) - before) * 1e6


def turns(vms: int, slice_turns: int) -> float:
    """Microseconds of `TURNS` turns of a host whose VMs compute.

    A slice is so many turns; if it is one, each turn begins with a switch.
    """
    with SharedHost(pcpus=1, ram="64M", policy=Share(slice_ns=slice_turns * TURN_NS)) as host:
        made = [spinning(host, name) for name in "ab"[:vms]]
        run_for(host, 8 * TURN_NS)
        before, began = counted(host), time.thread_time()
        run_for(host, TURNS * TURN_NS)
        took, switched = time.thread_time() - began, counted(host) - before
        assert switched == (TURNS // slice_turns if vms > 1 else 0), switched
        for vm in made:
            vm.close()
    return took * 1e6


def scheduled_switches(times: int) -> None:
    """A row for a switch with all that belongs to it: what turns with one cost beyond others."""
    pairs = [(turns(2, TURNS), turns(2, 1)) for _ in range(times)]
    rarely, each = zip(*pairs, strict=True)
    row("a context switch between two vCPUs, with the scheduler", *(
        (of(each) - of(rarely)) / (TURNS - 1) for of in (min, statistics.median)))  # fmt: skip


def switches(times: int) -> None:
    """A row for one vCPU taken off a pCPU and another one put on."""
    with SharedHost(pcpus=1, ram="64M") as host:
        made = [host.vm("2M", name=name) for name in "ab"]
        guests = [vm.vcpus[0].guest for vm in made]
        processor = host.processors[0]

        def to_and_fro() -> None:
            for _ in range(TURNS // 2):
                for guest, other in (guests, guests[::-1]):
                    guest.take_off()
                    other.place(processor)

        row("a context switch between two vCPUs", *least(to_and_fro, times, TURNS))
        for vm in made:
            vm.close()


def changes(times: int) -> None:
    """Rows for one frame of a p2m that is in a million pieces."""
    host, p2m = Host("16G"), P2m()
    for gfn in range(0, PIECES, 2):  # no two neighbors go on
        p2m.map(gfn, 2 * PIECES - gfn, 1)
        p2m.map(gfn + 1, gfn + 1, 1)
    ept = Ept(host, p2m)
    p2m.map(PIECES // 2, 5, 1)
    row("map one frame of 2^20, with the EPT", *least(
        lambda: [p2m.map(PIECES // 2 + n, 7 + n, 1) for n in range(100)], times, 100))  # fmt: skip
    row("protect one frame of 2^20, with the EPT", *least(
        lambda: [p2m.protect(PIECES // 2 + n) or p2m.unprotect(PIECES // 2 + n)
                 for n in range(100)], times, 200))  # fmt: skip
    ept.close()


def clones(times: int) -> None:
    """Rows for a booted cloud kernel of 256 MBytes."""
    with LinuxVM.linux("cloud-amd64", memory="256M") as vm, tempfile.TemporaryDirectory() as folder:
        vm.run("true").check()
        file = Path(folder) / "cloud.usnap"
        row("snapshot to a file", *least(lambda: vm.write(file), times))
        row("restore from a file", *least(lambda: LinuxVM.restore(file).close(), times))
        with vm.snapshot() as image:
            made: list[LinuxVM] = []
            row("a clone", *least(lambda: made.extend(image.fork()), times))
            for clone in made:
                clone.close()


def row(name: str, fastest: float, median: float) -> None:
    """One line of the table."""
    print(f"| {name} | {fastest:,.1f} | {median:,.1f} |", flush=True)


def main() -> None:
    """Print the table, in microseconds."""
    parser = argparse.ArgumentParser(prog="python -m bench.heart", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="repetitions of each row")
    times = parser.parse_args().times
    print("| what | least, us | median, us |\n|---|---|---|")
    exits(times)
    exits_on_a_host(times)
    switches(times)
    scheduled_switches(times)
    changes(times)
    clones(times)


if __name__ == "__main__":
    main()
