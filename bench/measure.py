"""One run of the benchmark: every row in every place, interleaved, several times.

Invariants: within a repetition a row runs in all places one directly after the other, so that what
else the computer does hits all alike, and the order of the places turns from one repetition to the
next; results must be equal everywhere; a place that failed is started afresh.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.markers import Failed
from bench.rows import BOOT, Row
from bench.stats import Spread, spread_of_ratios
from bench.subjects import Subject

PATIENCE = 2  # a guest takes long to not boot


@dataclass
class Result:
    """What was seen of one row: seconds by place and repetition (None where it failed)."""

    row: Row
    scale: float = 1.0
    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def ratio(self, slow: str, fast: str) -> Spread | None:
        """How many times longer `slow` took than `fast`, pairwise in each repetition."""
        pairs = zip(self.seconds.get(slow, []), self.seconds.get(fast, []), strict=False)
        return spread_of_ratios([(a, b) for a, b in pairs if a is not None and b is not None])

    def typical(self, place: str) -> float | None:
        """The median of what one run took there, in seconds."""
        known = [seconds for seconds in self.seconds.get(place, []) if seconds is not None]
        return median(known) if known else None

    def microseconds_each(self, place: str) -> float | None:
        """What one operation took there, for rows that are about one operation."""
        seconds = self.typical(place)
        if seconds is None or not self.row.each:
            return None
        return 1e6 * seconds / (self.row.scaled(self.scale) * self.row.each)


class Bench:
    """The places, the rows, and what has been measured so far."""

    def __init__(
        self,
        subjects: list[Subject],
        rows: list[Row],
        missing: dict[str, str],
        *,
        scale: float,
        timeout: float,
        tell: Callable[[str], None],
    ) -> None:
        self.subjects, self.scale, self.timeout, self.tell = subjects, scale, timeout, tell
        self.results = {row.name: Result(row, scale) for row in rows}
        self.running: set[str] = set()
        self.refusals: dict[str, int] = {}  # starts that failed, one after the other
        for name, reason in missing.items():
            self.results[name].problems.append(reason)

    def measure(self, repetitions: int) -> list[Result]:
        """All rows, `repetitions` times."""
        try:
            for repetition in range(repetitions):
                for number, result in enumerate(self.results.values()):
                    if result.problems and not result.seconds:
                        continue  # not built
                    turn = (repetition + number) % len(self.subjects)
                    for subject in self.subjects[turn:] + self.subjects[:turn]:
                        self._once(result, subject, repetition, repetitions)
        finally:
            for subject in self.subjects:
                subject.stop()
        return list(self.results.values())

    def _once(self, result: Result, subject: Subject, repetition: int, repetitions: int) -> None:
        row = result.row
        if row.guests_only and not subject.boots:
            return
        self.tell(f"{repetition + 1}/{repetitions} {row.name}: {subject.name}")
        seconds: float | None = None
        try:
            if self.refusals.get(subject.name, 0) >= PATIENCE:
                raise Failed(f"given up, it did not start {PATIENCE} times running")
            seconds = self._boot(subject) if row is BOOT else self._run(result, subject)
        except Failed as failure:
            self._note(result, f"{subject.name}: {failure}")
            subject.stop()
            self.running.discard(subject.name)
        result.seconds.setdefault(subject.name, []).append(seconds)

    def _boot(self, subject: Subject) -> float:
        subject.stop()
        self.running.discard(subject.name)
        try:
            return self._start(subject, subject.built.boot_initramfs)
        finally:
            subject.stop()

    def _start(self, subject: Subject, initramfs: Path) -> float:
        self.refusals[subject.name] = self.refusals.get(subject.name, 0) + 1
        seconds = subject.start(initramfs)
        self.refusals[subject.name] = 0
        return seconds

    def _run(self, result: Result, subject: Subject) -> float:
        if subject.name not in self.running:
            self._start(subject, subject.built.initramfs)
            self.running.add(subject.name)
        sample = subject.run(result.row.command(self.scale), self.timeout)
        known = next(iter(result.checksums.items()), (subject.name, sample.checksum))
        result.checksums.setdefault(subject.name, sample.checksum)
        if sample.checksum != known[1]:
            self._note(result, f"wrong: {subject.name} {sample.checksum}, {known[0]} {known[1]}")
        return sample.seconds

    @staticmethod
    def _note(result: Result, problem: str) -> None:
        if problem not in result.problems:
            result.problems.append(problem)
