"""Interleaving, equal results, and what happens when a place fails."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.build import Built
from bench.markers import Failed, Sample
from bench.measure import Bench, Result
from bench.report import as_json, show, worst_first
from bench.rows import BOOT, select
from bench.subjects import Subject


class Scripted(Subject):
    """A place that answers as it was told and writes down what it was asked."""

    def __init__(self, name: str, seconds: float, diary: list[str], built: Built) -> None:
        super().__init__(None, built, built.root)
        self.name, self.seconds, self.diary = name, seconds, diary
        self.boots = name != "native"
        self.checksum, self.fails_once, self.never_starts = "c0ffee", "", False

    def version(self) -> str:
        return "scripted"

    def start(self, initramfs: Path) -> float:
        self.diary.append(f"{self.name} starts {initramfs.name}")
        if self.never_starts:
            raise Failed("no kernel")
        return self.seconds

    def run(self, command: list[str], timeout: float) -> Sample:
        self.diary.append(f"{self.name} {command[0]}")
        if command[0] == self.fails_once:
            self.fails_once = ""
            raise Failed("it fell over")
        return Sample(self.seconds, self.checksum)

    def stop(self) -> None:
        self.diary.append(f"{self.name} stops")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Scripted]:
    built = Built(tmp_path, tmp_path / "all", tmp_path / "small")
    diary: list[str] = []
    seconds = {"native": 1.0, "tcg": 12.0, "understudy": 2.0}
    return {name: Scripted(name, took, diary, built) for name, took in seconds.items()}


def measure(places: dict[str, Scripted], only: str, reps: int = 1) -> list[Result]:
    rows = select(only)
    bench = Bench(list(places.values()), rows, {}, scale=1, timeout=1, tell=lambda step: None)
    return bench.measure(reps)


def test_places_take_turns_row_by_row(places: dict[str, Scripted]) -> None:
    measure(places, "crc,fib", reps=2)
    runs = [line for line in places["tcg"].diary if "bench/" in line]
    assert runs == [
        *("native bench/crc", "tcg bench/crc", "understudy bench/crc"),
        *("tcg bench/fib", "understudy bench/fib", "native bench/fib"),
        *("tcg bench/crc", "understudy bench/crc", "native bench/crc"),
        *("understudy bench/fib", "native bench/fib", "tcg bench/fib"),
    ]


def test_a_place_starts_once_and_afresh_after_a_failure(places: dict[str, Scripted]) -> None:
    places["tcg"].fails_once = "bench/crc"

    crc, fib = measure(places, "crc,fib", reps=2)

    assert crc.seconds["tcg"] == [None, 12.0]
    assert fib.seconds["tcg"] == [12.0, 12.0]
    assert crc.problems == ["tcg: it fell over"]
    starts = [line for line in places["tcg"].diary if "starts" in line]
    assert [line.split()[0] for line in starts].count("tcg") == 2
    assert len(starts) == 4
    ratio = crc.ratio("tcg", "understudy")
    assert ratio is not None and ratio.median == 6.0


def test_a_place_that_never_starts_is_given_up_and_every_row_says_so(
    places: dict[str, Scripted],
) -> None:
    places["tcg"].never_starts = True

    results = measure(places, "crc,fib,tree,lz", reps=2)

    assert places["tcg"].diary.count("tcg starts all") == 2
    assert [result.seconds["tcg"] for result in results] == 4 * [[None, None]]
    assert all(any("given up" in line for line in result.problems) for result in results)


def test_different_results_are_a_problem(places: dict[str, Scripted]) -> None:
    places["understudy"].checksum = "c0ffef"
    (crc,) = measure(places, "crc", reps=2)
    assert crc.problems == ["wrong: understudy c0ffef, native c0ffee"]


def test_the_boot_row_starts_every_guest_each_time(places: dict[str, Scripted]) -> None:
    (boot,) = measure(places, "boot", reps=2)
    assert boot.row is BOOT
    assert boot.seconds == {"tcg": [12.0, 12.0], "understudy": [2.0, 2.0]}
    starts = [line for line in places["tcg"].diary if "starts" in line]
    assert starts == ["tcg starts small", "understudy starts small"] * 2


def test_rows_are_reported_worst_first_and_none_is_left_out(places: dict[str, Scripted]) -> None:
    rows = select("crc,fib,gmp")
    missing = {"gmp": "not built: needs libgmp-dev (libgmp.a)"}
    bench = Bench(list(places.values()), rows, missing, scale=1, timeout=1, tell=lambda step: None)
    results = bench.measure(1)
    by_name = {result.row.name: result for result in results}
    by_name["crc"].seconds["tcg"] = [3.0]

    assert [result.row.name for result in worst_first(results)] == ["gmp", "crc", "fib"]
    report = as_json(results)
    assert report["groups"]["loops"]["tcg/understudy"] == pytest.approx(3.0)
    assert [row["name"] for row in report["rows"]] == ["gmp", "crc", "fib"]
    page = io.StringIO()
    show(results, Console(file=page, width=130))
    for word in ("crc", "fib", "gmp", "needs libgmp-dev", "geomean", "6.00", "1.50"):
        assert word in page.getvalue()
