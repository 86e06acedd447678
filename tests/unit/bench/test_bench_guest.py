"""The rows of the comparison in a whole Debian, whose turn it is, and what becomes of failures."""

from pathlib import Path
from typing import Any

import pytest

from bench.guest.__main__ import as_markdown
from bench.guest.machine import Machine
from bench.guest.measure import measured
from bench.guest.rows import ROWS, Row, select
from bench.markers import Failed


class Scripted:
    """A place that answers as it was told and writes down what it was asked."""

    def __init__(self, name: str, seconds: float, diary: list[str]) -> None:
        self.name, self.seconds, self.diary, self.fails_at = name, seconds, diary, ""

    def start(self, *, is_pair: bool) -> float:
        self.diary.append(f"{self.name} starts {'two' if is_pair else 'one'}")
        return self.seconds

    def run(self, row: Row, scale: float, port: int, timeout: float) -> float:
        self.diary.append(f"{self.name} {row.name}")
        if row.name == self.fails_at:
            raise Failed("it fell over")
        return self.seconds * scale

    def stop(self) -> None:
        self.diary.append(f"{self.name} stops")


def _measured(only: str, **fails: str) -> tuple[list[Any], list[str]]:
    diary: list[str] = []
    places = [Scripted("tcg", 6.0, diary), Scripted("understudy", 2.0, diary)]
    for place in places:
        place.fails_at = fails.get(place.name, "")
    table = measured(places, select(only), 1, 0.5, 5000, lambda step: None)  # type: ignore[arg-type]
    return table, [line for line in diary if "stops" not in line]


def test_rows_run_in_turns_and_pairs_come_last() -> None:
    table, diary = _measured("iperf-vms,fio-read,fio-write")
    assert diary == [
        "tcg starts one", "tcg fio-read", "understudy starts one", "understudy fio-read",
        "understudy fio-write", "tcg fio-write",
        "tcg starts two", "tcg iperf-vms", "understudy starts two", "understudy iperf-vms",
    ]  # fmt: skip
    lead = table[0].lead()
    assert lead is not None and lead.median == 3.0


def test_a_place_that_failed_starts_afresh_and_the_row_says_so() -> None:
    table, diary = _measured("fio-read,fio-write", understudy="fio-read")
    assert diary.count("understudy starts one") == 2
    lines = as_markdown(table, 0.5)
    assert "fio-read: understudy: it fell over" in lines
    assert "| fio-read | 512 MB in 1 MB | 3.00 | - | - |" in lines
    assert "| fio-write | 512 MB in 1 MB | 3.00 | 1.00 | 3.00 [3.00..3.00] |" in lines


def test_the_boot_is_a_start() -> None:
    table, diary = _measured("boot")
    assert diary == ["tcg starts one", "understudy starts one"]
    assert table[0].seconds == {"tcg": [6.0], "understudy": [2.0]}


def test_names_of_rows_and_groups() -> None:
    assert {row.group for row in select("disk,boot")} == {"disk", "system"}
    with pytest.raises(ValueError, match="no row is called 'x'"):
        select("x")
    for row in ROWS:
        assert "{" not in row.command(0, 5000), row.name


class Console(Machine):
    """A guest that says what it was told to."""

    def __init__(self, log: Path, says: bytes) -> None:
        super().__init__(log)
        self.says, self.typed = says, b""

    def send(self, data: bytes) -> None:
        self.typed += data

    def until(self, is_done: Any, timeout: float) -> None:
        self.hear(self.says)
        if not is_done():
            raise Failed(self.heard())


def test_what_a_console_says(tmp_path: Path) -> None:
    guest = Console(tmp_path / "log", b"S\r\nE 0\r\nX 0\r\n")
    assert guest.run("fio x", 1) >= 0 and b"{ fio x; } >out" in guest.typed
    guest.says = b"S\r\nE 0\r\nno such file\r\nX 2\r\n"
    with pytest.raises(Failed, match=r"status 2.*no such file"):
        guest.run("fio x", 1)
    guest.close()
    assert (tmp_path / "log").read_bytes().endswith(b"X 2\r\n")
