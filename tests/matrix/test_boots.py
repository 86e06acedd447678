"""Whole boots agree with the recorded ones, to the last instruction and exit.

What: runs guests from power-on to power-off as `boots` does, and compares all that is counted, the
console, the memory and the time with boots.json.
Source: boots.json, which `make boots` records.  Invariant: a boot is left out only where what it
depends on is not what was recorded, and then the reason says so.
"""

import copy

import pytest

from tests.matrix import boots
from tests.matrix.boots import GUESTS, TECHNIQUES
from understudy.guests.entry import GuestError

RECORDED = boots.load()
QUICK = {("hello", paging) for paging in TECHNIQUES} | {
    ("cloud-amd64", "ept"),
    ("cloud-amd64", "lazy"),
    ("686-pae", "ept"),
}


def _rows() -> list[object]:
    rows = []
    for guest in GUESTS:
        for paging in TECHNIQUES:
            marks = [] if guest == "hello" else [pytest.mark.real_guest]
            if (guest, paging) not in QUICK:
                marks.append(pytest.mark.slow)
            rows.append(pytest.param(guest, paging, marks=marks, id=f"{guest}-{paging}"))
    return rows


def check(guest: str, paging: str, engine: str = "dbt") -> None:
    """The boot is as it was recorded; a sentence for each count that is not."""
    try:
        reason = boots.reason_to_skip(RECORDED, guest)
    except GuestError as error:
        pytest.skip(f"{guest} cannot be fetched here: {error}")
    if reason is not None:
        pytest.skip(reason)
    recorded, found = RECORDED["boots"][guest][paging], boots.boot(guest, paging, engine)
    if RECORDED["flags_left_open"] != boots.flags_left_open():
        found["ram_sha256"] = recorded["ram_sha256"]
    apart = list(boots.differences(recorded, found))
    if apart:
        pytest.fail(
            f"{guest} under {paging} is not the boot that was recorded:\n" + "\n".join(apart)
        )


@pytest.mark.parametrize(("guest", "paging"), _rows())
def test_a_boot_is_as_recorded(guest: str, paging: str) -> None:
    check(guest, paging)


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_the_reference_engine_agrees(paging: str) -> None:
    check("hello", paging, "reference")


def test_the_table_is_whole() -> None:
    """Every guest under every technique, and each Linux has powered itself off."""
    assert {guest: tuple(rows) for guest, rows in RECORDED["boots"].items()} == dict.fromkeys(
        GUESTS, TECHNIQUES
    )
    for guest, rows in RECORDED["boots"].items():
        ends = {row["end"] for row in rows.values()}
        assert ends == {"budget" if guest == "memtest86+" else "poweroff"}, guest


def test_what_no_technique_may_change_is_the_same_under_each() -> None:
    """A guest cannot tell how its memory is virtualised."""
    for guest, rows in RECORDED["boots"].items():
        for name in ("instructions", "guest_ns", "console_sha256", "ram_sha256"):
            assert len({str(row[name]) for row in rows.values()}) == 1, (guest, name)


def test_a_difference_is_a_sentence() -> None:
    """The comparison can fail, and names the count."""
    recorded = RECORDED["boots"]["hello"]["vtlb"]
    other = copy.deepcopy(recorded)
    other["exits"]["IO_INSTRUCTION"] += 2
    other["exits"]["CPUID"] = 1
    del other["walk"]["guest"]["4"]
    assert list(boots.differences(recorded, other)) == [
        "exits[IO_INSTRUCTION]: expected 72, got 74 (+2).",
        "exits[CPUID]: expected 0, got 1 (+1).",
        "walk[guest][4]: expected 3, got 0 (-3).",
    ]


def test_another_version_of_a_package_is_a_reason_to_skip() -> None:
    table = copy.deepcopy(RECORDED)
    table["packages"]["hello"] = {"hello": "0"}
    reason = boots.reason_to_skip(table, "hello")
    assert reason is not None
    assert "recorded with another version of the package" in reason
    assert "`make boots`" in reason


def on_computer(monkeypatch: pytest.MonkeyPatch, **changes: bool) -> None:
    """As if this computer had, or lacked, these besides."""
    there = boots.host_features() | changes
    monkeypatch.setattr(boots, "host_features", lambda: there)


def test_what_no_guest_is_shown_is_no_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {guest: boots.features(guest) for guest in GUESTS}
    for there in (False, True):
        on_computer(monkeypatch, gfni=there, sha=there, rdrand=there)
        assert {guest: boots.features(guest) for guest in GUESTS} == before


def test_what_a_guest_is_shown_of_the_computer_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = copy.deepcopy(RECORDED)
    monkeypatch.setattr(boots, "versions", table["packages"].get)
    on_computer(monkeypatch, **dict.fromkeys(boots.host_features(), True))
    table["features"] = {guest: boots.features(guest) for guest in GUESTS}
    assert all(boots.reason_to_skip(table, guest) is None for guest in GUESTS)
    on_computer(monkeypatch, avx2=False, sse42=False)
    for guest, setting in GUESTS.items():
        reason = boots.reason_to_skip(table, guest)
        if setting.cpu == "baseline":  # the same everywhere
            assert reason is None
        else:
            assert reason is not None
            assert "differs in avx2, sse4_2: record again with `make boots`" in reason


def test_what_is_quick_runs_on_any_computer() -> None:
    """Boots of a 64-bit Linux are compared wherever the packages can be had."""
    assert GUESTS["cloud-amd64"].cpu == "baseline"
    assert {setting.cpu for setting in GUESTS.values()} == {"baseline", boots.DEFAULT}
