"""What boots: execution x paging x guest; `make techniques` writes docs/results/techniques.md.

What: each guest under each pair of techniques: Debian's kernels come up to init, run a command in
the agent and power off, the teaching kernels check themselves, `hello` says hello.  A pair that
does not exist is in the table with its reason.
Source: none.  Invariants: the pairs are those of the code (`Execution.ALL`, `Paging`'s); a run
that ends otherwise than it should is in the table as what it said.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.guests.fetched import KERNELS
from tests.tree import ROOT
from understudy.execution import Execution
from understudy.guests import debian
from understudy.linux import VM
from understudy.paging import Paging
from understudy.verdict import StopKind

FILE = ROOT / "docs" / "results" / "techniques.md"
OWN = ("hello", "teaching", "teaching-32")
PARAVIRTUAL = ("teaching-pv", "teaching-pv-32")
GUESTS = KERNELS + OWN + PARAVIRTUAL
SLOW = ("emulate",)  # an instruction at a time: Debians are run for so long
SLOW_BUDGET = 1_000_000
BUDGET = 200_000_000  # of our own kernels
PAGINGS = (*sorted(Paging.ALL), *sorted(Paging.PV))
COMMAND = "uname -srm"

NO_EPT = "the processor is not in VMX operation, so it has no second level of tables"
NATIVE = "its kernel is not paravirtual"
DIRECT = "the guest's tables are validated and used directly"
NO_SHADOW = "it translates each access itself, so there are no tables to shadow"
WHY = {
    ("vmx", "pv"): "the guest's own tables are used, so its kernel has to be paravirtual",
    ("bt", "ept"): NO_EPT,
    ("bt", "pv"): NATIVE,
    ("deprivileged", "ept"): NO_EPT,
    ("deprivileged", "pv"): NATIVE,
    ("emulate", "eager"): NO_SHADOW,
    ("emulate", "lazy"): NO_SHADOW,
    ("emulate", "vtlb"): NO_SHADOW,
    ("emulate", "pv"): NATIVE,
    ("pv", "ept"): NO_EPT,
    ("pv", "eager"): DIRECT,
    ("pv", "lazy"): DIRECT,
    ("pv", "vtlb"): DIRECT,
}
"""Why a pair of techniques does not exist."""

HEAD = """\
# What boots: execution x paging x guest

`make techniques` writes this table. A Debian is shown with the instructions it retires from \
power-on through a command (`uname -srm`) to its own power-off, its exits, and the seconds that \
this took on the computer where it was written, beside other work; a cell is empty if nobody has \
run it. Runs are in virtual time: the counts are the same each time.

Under `deprivileged` the processor has the option `--virtualizable-isa`, without which it ends by \
design with the names of the sensitive instructions that slipped through (`hello` has none). \
`emulate` interprets in Python: Debians are run for their first million instructions, which \
repeat much; 20 million are compared with vmx by `pytest -m slow tests/matrix/test_emulate.py`.
"""


class Job(NamedTuple):
    """One cell."""

    execution: str
    paging: str
    guest: str


def pairs() -> Iterator[tuple[str, str]]:
    """All, whether they exist or not."""
    return ((execution, paging) for execution in Execution.ALL for paging in PAGINGS)


def exists(execution: str, paging: str) -> bool:
    """Whether the code says that this pair makes sense."""
    return paging in Execution.ALL[execution].goes_with()


def guests_of(execution: str) -> tuple[str, ...]:
    """Those that it is for."""
    return PARAVIRTUAL if execution == "pv" else KERNELS + OWN


def cell(job: Job) -> str:
    """What happened."""
    started = time.monotonic()
    try:
        with _vm(job) as vm:
            said = _slow(vm) if job.execution in SLOW and job.guest in KERNELS else _whole(vm, job)
            if said is not None:
                return said
            exits, instructions = sum(vm.counts()["exits"].values()), vm.instructions
    except Exception as problem:
        return f"**{type(problem).__name__}: {str(problem).splitlines()[0]:.100}**"
    seconds = time.monotonic() - started
    return f"{_short(instructions)}, {_short(exits)}, {seconds:,.0f} s"


def _short(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 100_000 else f"{number / 1e3:,.1f} K"


def _vm(job: Job) -> VM:
    options: dict[str, Any] = {"execution": job.execution, "paging": job.paging}
    if Execution.ALL[job.execution].needs_all_traps:
        options["virtualizable_isa"] = True
    if job.guest in KERNELS:
        return VM.linux(job.guest, memory="256M", **options)
    if job.guest != "hello":
        options["append"] = "check"
    return VM.linux(job.guest, memory="16M", **options)


def _slow(vm: VM) -> str:
    started = time.monotonic()
    stop = vm.go(budget=SLOW_BUDGET)
    if stop.kind is not StopKind.BUDGET:
        return f"**{stop.kind}: {stop.detail:.100}**"
    rate = SLOW_BUDGET / (time.monotonic() - started)
    return f"goes: {rate / 1e3:,.0f} K instructions/s"


def _whole(vm: VM, job: Job) -> str | None:
    if job.guest in KERNELS:
        vm.wait_for_agent(timeout_wall_s=3600)
        said = vm.run(COMMAND, timeout_wall_s=3600).check().output
        if not said.startswith("Linux "):
            return f"**{said:.100}**"
        vm.power_off(timeout_wall_s=1800)
        return None
    heard = bytearray()
    vm.console.on_output.append(heard.extend)
    stop = vm.go(budget=BUDGET)
    is_well = job.guest == "hello" or b"self-check: ok, failed 0" in heard
    if stop.kind is StopKind.POWEROFF and is_well:
        return None
    return f"**{stop.kind}: {stop.detail:.100}**"


def as_table(cells: dict[Job, str], guests: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table: a row for each pair of techniques."""
    yield "| | " + " | ".join(guests) + " |"
    yield "|---" * (len(guests) + 1) + "|"
    for execution, paging in pairs():
        row = [cells.get(Job(execution, paging, guest), "") for guest in guests]
        if any(row):
            yield f"| {execution}, {paging} | " + " | ".join(row) + " |"


def document(cells: dict[Job, str]) -> str:
    """The whole file."""
    groups = {"Debian's kernels": KERNELS, "Our own": OWN, "Paravirtual ones": PARAVIRTUAL}
    lines = [HEAD]
    for name, guests in groups.items():
        lines += [f"## {name}", "", *as_table(cells, guests), ""]
    lines += ["## What does not exist, and why", "", "| | |", "|---|---|"]
    lines += [f"| {e}, {p} | {WHY[e, p]} |" for e, p in pairs() if not exists(e, p)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cells, or some, and write the table; what was not run stays as it was."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.techniques", description=__doc__)
    parser.add_argument("--execution", action="append", choices=Execution.ALL, help="only these")
    parser.add_argument("--guest", action="append", choices=GUESTS, help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument(
        "--cells", type=Path, default=Path("build/techniques.json"), help="what is known so far"
    )
    chosen = parser.parse_args()
    cells: dict[Job, str] = {}
    if chosen.cells.exists():
        cells = {Job(*k.split()): v for k, v in json.loads(chosen.cells.read_text()).items()}
    jobs = [
        Job(execution, paging, guest)
        for execution, paging in pairs()
        if exists(execution, paging) and execution in (chosen.execution or Execution.ALL)
        for guest in guests_of(execution)
        if guest in (chosen.guest or GUESTS)
    ]
    for guest in KERNELS:
        debian.fetch(guest)
    chosen.cells.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for job, said in zip(jobs, pool.map(cell, jobs), strict=True):
            cells[job] = said
            print(f"{' '.join(job):40} {said}", flush=True)
            known = {" ".join(job): said for job, said in cells.items()}
            chosen.cells.write_text(json.dumps(known, indent=1))
            FILE.write_text(document(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
