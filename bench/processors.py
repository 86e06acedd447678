"""`python -m bench.processors`: what computes on two threads, on one vCPU and on two.

What: real time of one Debian for a program with two threads (sysbench's primes) and for two shells
at once, in turns with one and two vCPUs, and natively on one processor and on two.  Shown are the
ratio of the least times (other programs on the computer can only make times longer) and the median
of each pair's.  Source: sysbench(1).
Invariant: all ends with the same result wherever it runs, or this ends with an error.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from understudy.linux import VM

SUM = "n=0; s=0; while [ $n -lt {turns} ]; do n=$((n+1)); s=$(((s*31+n)%1000003)); done; echo $s"
BOTH = "read a x < /proc/uptime; ({one}) & ({one}) & wait; read b x < /proc/uptime; echo $a $b"
PRIMES = "/usr/bin/sysbench cpu --threads=2 --time=0 --events={events} run"
SAID = re.compile(r"total time: +([0-9.]+)s\s+total number of events: +(\d+)")
NATIVE_TIMES = 4  # as many turns, so that starting the programs is little beside them

Shell = Callable[[str], str]


def shells(shell: Shell, turns: int) -> tuple[float, str]:
    """Seconds of two shells at once, and their sums.

    They are taken where the programs run: a guest whose clock went on while another one was run has
    its hands full when it is asked again, and answers late.
    """
    *sums, begin, end = shell(BOTH.format(one=SUM.format(turns=turns))).split()
    return float(end) - float(begin), " ".join(sums)


def primes(shell: Shell, events: int) -> tuple[float, str]:
    """Seconds of sysbench's two threads by its own clock, and how often they looked for primes."""
    found = SAID.search(shell(PRIMES.format(events=events)))
    if found is None:
        raise SystemExit("sysbench did not say how long it took")
    return float(found[1]), found[2]


def natively(processors: int, program: str) -> str:
    """What it prints on this computer."""

    def stay() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])

    command = ["busybox", "sh", "-c", program]
    done = subprocess.run(command, preexec_fn=stay, check=True, capture_output=True, text=True)
    return done.stdout


def in_guest(vm: VM, program: str) -> str:
    """What it prints in a guest."""
    return vm.run(program).check().output


def compare(name: str, places: Mapping[int, Callable[[], tuple[float, str]]], times: int) -> None:
    """One row of the table."""
    took, results = dict[int, list[float]](), set[str]()
    for _ in range(times):
        for processors, measured in places.items():
            seconds, result = measured()
            took.setdefault(processors, []).append(seconds)
            results.add(result)
    ratios = [one / two for one, two in zip(took[1], took[2], strict=True)]
    if len(results) != 1:
        raise SystemExit(f"{name}: the results differ: {sorted(results)}")
    least = min(took[1]) / min(took[2])
    print(f"| {name} | {least:.2f} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.processors", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="repetitions of each row")
    parser.add_argument("--turns", type=int, default=400_000, help="of each shell's loop")
    parser.add_argument("--events", type=int, default=6_000, help="of sysbench")
    options = parser.parse_args()
    rows: list[tuple[str, Callable[[Shell, int], tuple[float, str]], int]] = [
        ("a program with two threads (sysbench cpu)", primes, options.events),
        ("two shells at once", shells, options.turns),
    ]
    print("| two processors against one | least times | median |")
    print("|---|---|---|")
    with ExitStack() as open_:
        guests: dict[int, Shell] = {
            cpus: partial(
                in_guest,
                open_.enter_context(
                    VM.linux("cloud-amd64", cpus=cpus, clock="wall", packages=["sysbench"])
                ),
            )
            for cpus in (1, 2)
        }
        for name, program, size in rows:
            places = {n: partial(program, shell, size) for n, shell in guests.items()}
            compare(f"{name}, understudy", places, options.times)
    if shutil.which("sysbench") is None:
        print("(natively without sysbench: apt-get install sysbench)")
        del rows[0]
    for name, program, size in rows:
        places = {n: partial(program, partial(natively, n), NATIVE_TIMES * size) for n in (1, 2)}
        compare(f"{name}, native", places, options.times)


if __name__ == "__main__":
    main()
