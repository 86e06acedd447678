"""One run of the comparison: every row in both places, one directly after the other.

Source: ours.
Invariants: a ratio is taken within one repetition; who is first turns from row to row and from
repetition to repetition; a place that failed is started afresh for the next row.
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import socket
from statistics import median

from bench.guest.place import Place
from bench.guest.rows import Row
from bench.markers import Failed
from bench.stats import Spread, spread_of_ratios

PATIENCE_S = 1800.0  # for one row


@dataclass
class Seen:
    """What was seen of a row: seconds by place and repetition, None where it failed."""

    row: Row
    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lead(self) -> Spread | None:
        """How many times as long TCG took."""
        pairs = zip(self.seconds.get("tcg", []), self.seconds.get("understudy", []), strict=False)
        return spread_of_ratios([(a, b) for a, b in pairs if a is not None and b is not None])

    def typical(self, place: str) -> float | None:
        """The median of what it took there."""
        known = [one for one in self.seconds.get(place, []) if one is not None]
        return median(known) if known else None


def measured(
    places: Sequence[Place],
    rows: Sequence[Row],
    repetitions: int,
    scale: float,
    port: int,
    tell: Callable[[str], None],
) -> list[Seen]:
    """All rows, so many times.  `port`: where iperf3 listens on this computer."""
    table = [Seen(row) for row in rows]
    alone = [seen for seen in table if not seen.row.peer]
    pairs = [seen for seen in table if seen.row.peer]
    try:
        for repetition in range(repetitions):
            for bed in (alone, pairs):
                for place in places:
                    place.stop()
                is_up: set[str] = set()
                for number, seen in enumerate(bed):
                    turn = (repetition + number) % len(places)
                    for place in (*places[turn:], *places[:turn]):
                        tell(f"{repetition + 1}/{repetitions} {seen.row.name}: {place.name}")
                        took = _once(seen, place, is_up, scale, port)
                        seen.seconds.setdefault(place.name, []).append(took)
                        tell(f"    {took:.2f} s" if took is not None else seen.problems[-1])
    finally:
        for place in places:
            place.stop()
    return table


def _once(seen: Seen, place: Place, is_up: set[str], scale: float, port: int) -> float | None:
    row = seen.row
    try:
        if not row.line:
            place.stop()
            is_up.discard(place.name)
        if place.name not in is_up:
            booted = place.start(is_pair=bool(row.peer))
            is_up.add(place.name)
            if not row.line:
                return booted
        return place.run(row, scale, port, PATIENCE_S)
    except Failed as failure:
        seen.problems.append(f"{place.name}: {failure}")
        place.stop()
        is_up.discard(place.name)
        return None


@contextmanager
def iperf_server() -> Iterator[int]:
    """iperf3 on this computer's loopback; its port."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    try:
        server = subprocess.Popen(
            ["iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        raise Failed("no iperf3 on this computer: install iperf3") from None
    try:
        time.sleep(0.2)
        yield port
    finally:
        server.kill()
        server.wait()
