"""`python -m bench.processors`: two programs that compute at once, on one vCPU and on two.

What: real time of one Debian for both programs, in turns with one and two vCPUs, and natively on
one processor and on two.  Shown are the ratio of the least times (other programs on the computer
can only make times longer) and the median of each pair's.  Source: none.
Invariant: both programs end with the same sums wherever they run, or this ends with an error.
"""

import argparse
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from understudy.linux import VM

SUM = "n=0; s=0; while [ $n -lt {turns} ]; do n=$((n+1)); s=$(((s*31+n)%1000003)); done; echo $s"
BOTH = "read a x < /proc/uptime; ({one}) & ({one}) & wait; read b x < /proc/uptime; echo $a $b"
NATIVE_TIMES = 4  # as many turns, so that starting the programs is little beside them


def timed(both: Callable[[], str]) -> tuple[float, str]:
    """Seconds, and the sums.

    They are taken where the programs run: a guest whose clock went on while another one was run has
    its hands full when it is asked again, and answers late.
    """
    *sums, begin, end = both().split()
    return float(end) - float(begin), " ".join(sums)


def natively(program: str, processors: int) -> str:
    """The same on this computer."""

    def stay() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])

    command = ["busybox", "sh", "-c", program]
    done = subprocess.run(command, preexec_fn=stay, check=True, capture_output=True, text=True)
    return done.stdout


def in_guest(vm: VM, program: str) -> str:
    """In a guest."""
    return vm.run(program).check().output


def compare(name: str, places: Mapping[int, Callable[[], str]], times: int) -> None:
    """One row of the table."""
    took, sums = dict[int, list[float]](), set[str]()
    for _ in range(times):
        for processors, both in places.items():
            seconds, said = timed(both)
            took.setdefault(processors, []).append(seconds)
            sums.add(said)
    ratios = [one / two for one, two in zip(took[1], took[2], strict=True)]
    if len(sums) != 1:
        raise SystemExit(f"{name}: the sums differ: {sorted(sums)}")
    least = min(took[1]) / min(took[2])
    print(f"| {name} | {least:.2f} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.processors", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="repetitions of each row")
    parser.add_argument("--turns", type=int, default=400_000, help="of each program's loop")
    options = parser.parse_args()
    program = BOTH.format(one=SUM.format(turns=options.turns))
    print("| two programs that compute, two processors against one | least times | median |")
    print("|---|---|---|")
    with ExitStack() as open_:
        vms = {
            cpus: open_.enter_context(VM.linux("cloud-amd64", cpus=cpus, clock="wall"))
            for cpus in (1, 2)
        }
        places = {cpus: partial(in_guest, vm, program) for cpus, vm in vms.items()}
        compare("understudy", places, options.times)
    program = BOTH.format(one=SUM.format(turns=NATIVE_TIMES * options.turns))
    compare("native", {n: partial(natively, program, n) for n in (1, 2)}, options.times)


if __name__ == "__main__":
    main()
