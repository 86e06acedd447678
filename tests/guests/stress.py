"""Debian's stress-ng in a guest, under each paging technique.

What: boots a guest with the package in its initramfs, runs classes of stressors with their own
verification, and tells the runs without a fault from the others.
Source: stress-ng(1), --verify: a stressor that finds wrong contents says "fail"; one that a signal
ended counts as a "successful run", so what is printed is read line by line.
Invariant: a run is clean only if every stressor did something and nothing was said beside the
known lines, neither by stress-ng nor by the kernel.

`python -m tests.guests.stress [SECONDS [CLOCK [TECHNIQUE...]]]` prints docs/results/stress.md's
table, a row when it is done.
"""

import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tests.windows import force_windows
from understudy.linux import VM

CLASSES = ("vm", "fork", "mmap", "mprotect", "madvise")
PARALLEL = (
    "cpu", "vm", "fork", "switch", "futex", "mutex", "sem", "membarrier", "tlb-shootdown",
    "cpu-online",
)  # fmt: skip
"""Classes for several processors."""
TECHNIQUES = ("ept", "eager", "lazy", "vtlb")
GUEST = "cloud-amd64"
MEMORY = "512M"
SIZES = "--vm-bytes 64M --mmap-bytes 64M"
SMALL = "--vm-bytes 16M --mmap-bytes 2M"  # for wall time: a busy computer gets round to all of it
BRIEFLY = "--vm-bytes 1M --mmap-bytes 256K -t 1s"
GUEST_SECONDS = 200.0
WALL_SECONDS = 3600.0

METRIC = re.compile(r"^stress-ng: metrc: \[\d+\] ([a-z][\w-]*) +(\d+) +[\d.]+ ", re.M)
EXPECTED = re.compile(
    r"stress-ng: metrc: |stress-ng: info:  \[\d+\] "
    r"(setting to a |dispatching hogs: |successful run completed in |\w+: using )"
)

EXPECTED_OF_KERNEL = re.compile(
    r"\[[ \d.]+\] (sched: RT throttling activated|x86: Booting SMP configuration:"
    r"|smpboot: (CPU \d+ is now offline|Booting Node 0 Processor \d+ APIC 0x[0-9a-f]+)"
    r"|kvm-clock: cpu \d+, msr [0-9a-f]+, secondary cpu clock|kvm-guest: .*cpu \d+.*)"
)
"""What it says of real-time threads that take all (mutex), of processors that go and come."""


@dataclass(frozen=True)
class Outcome:
    """How a run of stress-ng ended."""

    status: int
    work: dict[str, int]  # bogo operations by class
    complaints: tuple[str, ...]  # lines of stress-ng and of the kernel that should not be there
    guest_s: float
    wall_s: float


def judge(text: str, classes: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The work done by each class, and the complaints, in what stress-ng printed."""
    work = {name: int(count) for name, count in METRIC.findall(text)}
    bad = [line for line in text.splitlines() if line.strip() and not EXPECTED.match(line)]
    bad += [f"{name} did nothing" for name in classes if not work.get(name)]
    return work, tuple(bad)


def boot(technique: str, clock: str = "virtual", cpus: int = 1, *, windows: bool = False) -> VM:
    """A guest that has stress-ng and has come up.  `windows`: they are forced on from its reset."""
    vm = VM.linux(
        GUEST, memory=MEMORY, packages=["stress-ng"], paging=technique, clock=clock, cpus=cpus
    )
    if windows:
        force_windows(vm)
    vm.wait_for_agent()
    return vm


def stress(vm: VM, classes: Iterable[str], options: str, each: int = 1) -> Outcome:
    """One run of stress-ng, with `each` stressors of a class at once; `options` say how long."""
    names = list(classes)
    stressors = " ".join(f"--{name} {each}" for name in names)
    vm.run("dmesg -c").check()
    began, wall = vm.clock.now(), time.monotonic()
    command = f"cd /tmp && stress-ng {stressors} --verify --metrics-brief {options}"
    done = vm.run(command, timeout_guest_s=GUEST_SECONDS, timeout_wall_s=WALL_SECONDS)
    took, real = (vm.clock.now() - began) / 1e9, time.monotonic() - wall
    work, complaints = judge(done.output, names)
    said = vm.run("dmesg").check().output.splitlines()
    kernel = [f"kernel: {line}" for line in said if not EXPECTED_OF_KERNEL.match(line)]
    return Outcome(done.status, work, (*complaints, *kernel), took, real)


def main() -> None:
    """Print the table."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    clock = sys.argv[2] if len(sys.argv) > 2 else "virtual"
    print("| technique | class | status | operations | complaints | guest s | wall s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for technique in sys.argv[3:] or TECHNIQUES:
        with boot(technique, clock) as vm:
            for name in CLASSES:
                end = stress(vm, [name], f"{SMALL if clock == 'wall' else SIZES} -t {seconds}s")
                complaints = "; ".join(end.complaints) or "none"
                times = f"{end.guest_s:.1f} | {end.wall_s:.0f}"
                row = f"{end.status} | {end.work.get(name, 0)} | {complaints} | {times}"
                print(f"| {technique} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
