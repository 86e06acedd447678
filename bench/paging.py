"""`python -m bench.paging`: what each way to virtualise memory costs, on one unmodified kernel.

What: a boot, processes that fork and wait, and two processes that switch, under each technique:
wall time, exits, and what an exit costs that only exists because of the technique.  Source: none.
Invariant: guest instructions and guest time are the same in every row of a table, or this ends
with an error: the times compare the same run.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from understudy.arch.exit_reason import Reason
from understudy.linux import VM

TECHNIQUES = ("ept", "vtlb", "lazy", "eager")
OF_PAGING = (
    Reason.EXCEPTION_OR_NMI, Reason.INVLPG, Reason.INVPCID, Reason.CR_ACCESS,
    Reason.MONITOR_TRAP_FLAG, Reason.EPT_VIOLATION,
)  # fmt: skip
FORKS, SWITCHES = 300, 1000
WORKLOADS = {
    "fork-and-wait": f"n=0; while [ $n -lt {FORKS} ]; do (:); n=$((n+1)); done",
    "process switching": (
        "mkfifo /tmp/to /tmp/from; (while read x; do echo $x; done </tmp/to >/tmp/from) & "
        "exec 3>/tmp/to 4</tmp/from; n=0; "
        f"while [ $n -lt {SWITCHES} ]; do echo $n >&3; read x <&4; n=$((n+1)); done; "
        "exec 3>&-; rm /tmp/to /tmp/from"
    ),
}
"""Shell commands; both loops run in busybox's shell, which forks for `(:)` and not for the rest."""


class Stopwatch:
    """The processor time that the hypervisor spends on exits of the memory-management unit."""

    def __init__(self, vm: VM) -> None:
        self.seconds, self.exits = 0.0, 0
        for reason in OF_PAGING:
            vm.vcpus[0].table[reason] = self._timed(vm.vcpus[0].table[reason])

    def _timed(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.thread_time

        def timed(vcpu: Any, exit: Any) -> Any:
            begin = clock()
            verdict = answer(vcpu, exit)
            self.seconds += clock() - begin
            self.exits += 1
            return verdict

        return timed


def measure(guest: str, paging: str, memory: str, profile: cProfile.Profile | None) -> list[Any]:
    """One VM: a row for the boot and one for each workload."""
    rows = []
    with VM.linux(guest, paging=paging, memory=memory) as vm:
        watch = Stopwatch(vm)
        if profile is not None:
            profile.enable()
        rows.append(step(vm, watch, "boot", vm.wait_for_agent))
        for name, command in WORKLOADS.items():
            rows.append(step(vm, watch, name, lambda command=command: vm.run(command).check()))
        if profile is not None:
            profile.disable()
    return rows


def step(vm: VM, watch: Stopwatch, name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """What one workload took."""
    before, spent, exits = vm.counts(), watch.seconds, watch.exits
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    after = vm.counts()
    of_paging = watch.exits - exits
    return {
        "workload": name,
        "paging": vm.paging,
        "seconds": round(seconds, 3),
        "exits": sum(after["exits"].values()) - sum(before["exits"].values()),
        "paging_exits": of_paging,
        "us_per_exit": round(1e6 * (watch.seconds - spent) / of_paging, 2) if of_paging else 0.0,
        "faults": {k: after["faults"][k] - before["faults"][k] for k in after["faults"]},
        "instructions": after["instructions"] - before["instructions"],
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for each workload."""
    for name in dict.fromkeys(row["workload"] for row in rows):
        table = Table(title=name)
        for heading in ("technique", "wall s", "exits", "of paging", "true", "hidden", "trace",
                        "us per exit"):  # fmt: skip
            table.add_column(heading, justify="left" if heading == "technique" else "right")
        for row in rows:
            if row["workload"] == name:
                faults = row["faults"]
                table.add_row(
                    row["paging"], f"{row['seconds']:.2f}", str(row["exits"]),
                    str(row["paging_exits"]), str(faults["true"]), str(faults["hidden"]),
                    str(faults["trace"]), f"{row['us_per_exit']:.1f}",
                )  # fmt: skip
        console.print(table)


def different(rows: list[dict[str, Any]]) -> list[str]:
    """Workloads that did not execute the same instructions under every technique."""
    by_name: dict[str, set[int]] = {}
    for row in rows:
        by_name.setdefault(row["workload"], set()).add(row["instructions"])
    return [f"{name}: {sorted(found)}" for name, found in by_name.items() if len(found) > 1]


def main() -> int:
    """Parses the command line and runs; the answer is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.paging", description=__doc__)
    parser.add_argument("--guest", default="cloud-amd64", help="a fetched guest (cloud-amd64)")
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--paging", default=",".join(TECHNIQUES), help="techniques, by commas")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, too")
    parser.add_argument("--json", type=Path, default=Path("build/paging.json"))
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    rows: list[dict[str, Any]] = []
    for paging in options.paging.split(","):
        print(f"bench: {options.guest} under {paging}", file=sys.stderr, flush=True)
        profile = cProfile.Profile() if options.profile else None
        rows += measure(options.guest, paging, options.memory, profile)
        if profile is not None:
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(15)
            console.print(f"{paging}\n{text.getvalue()}", markup=False)
    show(rows, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"guest": options.guest, "rows": rows}, indent=1) + "\n")
    for line in different(rows):
        print(f"bench: not the same run under every technique: {line}", file=sys.stderr)
    return int(bool(different(rows)))


if __name__ == "__main__":
    sys.exit(main())
