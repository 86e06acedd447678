"""`python -m bench.guest`: a whole Debian under understudy and under QEMU TCG, in turns.

Writes build/bench-guest.json, and prints the table in Markdown.  The status is 0 only if each row
ran in each place.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.__main__ import processor
from bench.guest.measure import PATIENCE_S, Seen, iperf_server, measured
from bench.guest.mirror import mirror
from bench.guest.place import PLACES, Place
from bench.guest.rows import INSTALLED, PACKAGES, ROWS, select
from bench.markers import Failed
from bench.stats import geomean
from understudy.guests.entry import GuestError
from understudy.linux import VM

OUT = Path("build/bench-guest.json")
FUNCTIONS = 25  # of a profile


def main() -> int:
    """Parses the command line and runs; the answer is the exit status."""
    options = parse()
    try:
        with ExitStack() as given:
            folder = Path(given.enter_context(tempfile.TemporaryDirectory(prefix="bench-guest-")))
            tell("the image")
            image = VM.whole("debian", PACKAGES)
            source = given.enter_context(mirror(folder / "mirror", [INSTALLED]))
            port = given.enter_context(iperf_server())
            names = options.places.split(",")
            places = [PLACES[name](image, folder, source) for name in names]
            for place in places:
                given.callback(place.stop)
            if options.profile:
                return profiled(places, options, port)
            begin = time.perf_counter()
            table = measured(places, select(options.only), options.reps, options.scale, port, tell)
            write(table, options, time.perf_counter() - begin)
    except (Failed, GuestError, KeyError, ValueError) as problem:
        tell(str(problem))
        return 2
    print("\n".join(as_markdown(table, options.scale)))
    return int(any(seen.problems for seen in table))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m bench.guest", description=__doc__)
    parser.add_argument("--only", default="", help="rows and groups, separated by commas")
    parser.add_argument("--reps", type=int, default=3, help="repetitions (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every row's size")
    parser.add_argument("--places", default=",".join(PLACES), help="(both)")
    parser.add_argument("--profile", action="store_true",
                        help="show what understudy's Python does in each row instead")  # fmt: skip
    return parser.parse_args()


def tell(step: str) -> None:
    """What is being done."""
    print(f"bench-guest: {step}", file=sys.stderr, flush=True)


def profiled(places: list[Place], options: argparse.Namespace, port: int) -> int:
    """Each row once under understudy; the functions that took most, and the VM's own counts."""
    place = next(place for place in places if place.name == "understudy")
    for row in select(options.only):
        place.stop()
        if not row.line:
            continue
        place.start(is_pair=bool(row.peer))
        profile = cProfile.Profile()
        with profile:
            seconds = place.run(row, options.scale, port, PATIENCE_S)
        print(f"\n## {row.name}: {seconds:.2f} s")
        pstats.Stats(profile).sort_stats("tottime").print_stats(FUNCTIONS)
    return 0


def as_markdown(table: list[Seen], scale: float) -> list[str]:
    """The table: the rows of each group, that with the smallest lead first."""
    lines = ["| row | how much | TCG s | understudy s | TCG/understudy |", "|---|---|---|---|---|"]
    for group in dict.fromkeys(row.group for row in ROWS):
        rows = [seen for seen in table if seen.row.group == group]
        for seen in sorted(rows, key=_lead):
            row, lead = seen.row, seen.lead()
            shown = f"{lead.median:.2f} [{lead.low:.2f}..{lead.high:.2f}]" if lead else "-"
            times = [_seconds(seen.typical(place)) for place in ("tcg", "understudy")]
            much = f"{row.scaled(scale)} {row.unit}"
            lines.append(f"| {row.name} | {much} | {' | '.join(times)} | {shown} |")
        mean = geomean(lead.median for seen in rows if (lead := seen.lead()))
        if mean is not None and len(rows) > 1:
            lines.append(f"| *{group}, geomean* | | | | {mean:.2f} |")
    return lines + [f"{seen.row.name}: {said}" for seen in table for said in seen.problems]


def _lead(seen: Seen) -> float:
    lead = seen.lead()
    return lead.median if lead else 0.0


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write(table: list[Seen], options: argparse.Namespace, took: float) -> None:
    """The same as plain data, and on what computer it was."""
    told: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "computer": {"processor": processor(), "count": os.cpu_count(), "load": os.getloadavg()},
        "options": {"reps": options.reps, "scale": options.scale},
        "took_seconds": took,
        "rows": {seen.row.name: {"seconds": seen.seconds, "problems": seen.problems}
                 for seen in table},
    }  # fmt: skip
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
