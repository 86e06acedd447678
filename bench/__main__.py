"""`python -m bench`: builds the programs, measures them, prints the table, writes the JSON.

The status is 0 only if every selected row that could be built ran everywhere with equal results.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.build import Built, build
from bench.markers import Failed
from bench.measure import Bench
from bench.report import as_json, show
from bench.rows import ROWS, select
from bench.subjects import APPEND, SUBJECTS, Subject

OUT = Path("build/bench")


def main() -> int:
    """Parses the command line and runs; the answer is the exit status."""
    options = parse()
    if options.list:
        for row in ROWS:
            print(f"{row.name:<12} {row.group:<9} size {row.size:<8} {row.package}")
        return 0
    talk = Console(stderr=True)
    try:
        return measure(options, talk)
    except (Failed, RuntimeError, ValueError, OSError) as problem:
        talk.print(f"bench: {problem}", markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        talk.print("bench: interrupted")
        return 130


def parse() -> argparse.Namespace:
    """The options; `--help` shows what they are for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="rows and groups, separated by commas")
    parser.add_argument("--reps", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--subjects", default="", help=f"of {','.join(SUBJECTS)} (all there are)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every row's size")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one run (120)")
    parser.add_argument("--kernel", type=Path, help="a bzImage (the fetched cloud-amd64)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    options = parser.parse_args()
    if options.reps < 1 or options.scale <= 0:
        parser.error("--reps must be at least 1 and --scale more than 0")
    return options


def measure(options: argparse.Namespace, talk: Console) -> int:
    """Everything between the command line and the exit status."""
    rows = select(options.only)
    OUT.mkdir(parents=True, exist_ok=True)
    steps = Steps(talk)
    with steps.status:
        built = build(rows, OUT, steps.tell)
        subjects, versions = choose(options, built, talk)
        bench = Bench(
            subjects,
            rows,
            built.missing,
            scale=options.scale,
            timeout=options.timeout,
            tell=steps.tell,
        )
        begin = time.perf_counter()
        results = bench.measure(options.reps)
    show(results, Console(width=None if sys.stdout.isatty() else 130))
    report = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "computer": {"processor": processor(), "count": os.cpu_count(), **versions},
        "options": {"reps": options.reps, "scale": options.scale, "append": APPEND},
        "took_seconds": time.perf_counter() - begin,
        **as_json(results),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(r.problems for r in results if r.row.name not in built.missing))


def choose(
    options: argparse.Namespace, built: Built, talk: Console
) -> tuple[list[Subject], dict[str, str]]:
    """The places that can be had; understudy, or one asked for by name, must be there."""
    names = options.subjects.split(",") if options.subjects else list(SUBJECTS)
    for name in names:
        if name not in SUBJECTS:
            raise ValueError(f"no subject is called {name!r}; there are {', '.join(SUBJECTS)}")
    kernel = options.kernel
    if kernel is None and any(SUBJECTS[name].boots for name in names):
        kernel = fetched_kernel()
    subjects, versions = [], {}
    for name in names:
        subject = SUBJECTS[name](kernel, built, OUT)
        try:
            versions[name] = subject.version()
            if subject.boots:
                subject.kernel_file()
        except Failed as reason:
            if options.subjects or name == "understudy":
                raise
            talk.print(f"bench: without {name}: {reason}", markup=False, style="yellow")
            continue
        subjects.append(subject)
    return subjects, versions


def fetched_kernel() -> Path | None:
    """The cloud-amd64 kernel from understudy's cache (fetched if need be), if that can be had."""
    try:
        debian: Any = importlib.import_module("understudy.guests.debian")
    except ImportError:
        return None
    return Path(debian.fetch("cloud-amd64").kernel)


class Steps:
    """Shows what is being done: a living line on a terminal, else a line for each repetition."""

    def __init__(self, console: Console) -> None:
        self.console, self.status, self.told = console, console.status("building"), ""

    def tell(self, step: str) -> None:
        """`step` is about to be done; its first word is its stage."""
        self.status.update(step)
        stage = step.split()[0]
        if not self.console.is_terminal and stage != self.told:
            self.console.print(f"bench: {step}", markup=False)
        self.told = stage


def processor() -> str:
    """The computer's processor by name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
