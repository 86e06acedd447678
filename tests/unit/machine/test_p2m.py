"""The p2m against a dictionary: maps, states, events, and how it is kept."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.machine.frame_table import GIGA, MOST
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import ABSENT, FRAMES, PRESENT, PROTECTED, RAM, Flag

EDGES = (0, 5, FRAMES, 3 * FRAMES, GIGA - FRAMES, GIGA, GIGA + 7)
"""Around these the changes are made: where blocks and gigabytes end."""
gfns = st.builds(lambda edge, off: max(edge + off, 0), st.sampled_from(EDGES), st.integers(-3, 3))
counts = st.sampled_from([1, 1, 1, 2, 7, FRAMES - 2, FRAMES, 2 * FRAMES + 1, GIGA, GIGA + FRAMES])
changes = st.tuples(
    st.sampled_from([
        "map", "same", "unmap", "swap", "balloon", "share", "log", "unshare", "free", "one for all",
    ]),
    gfns, counts, st.sampled_from([0, 1, FRAMES, GIGA]),
)  # fmt: skip
MANY = FRAMES + 7  # frames of which each is a range of its own
Ranges = list[tuple[int, int, int, int | None]]


class Oracle:
    """A list of ranges (gfn, end, flags, pfn - gfn): slow, and without any structure."""

    def __init__(self) -> None:
        self.ranges: Ranges = []

    def cut(self, gfn: int, end: int) -> Ranges:
        """Take [gfn, end) out; what was there."""
        kept: Ranges = []
        out: Ranges = []
        for low, high, flags, offset in self.ranges:
            if low < gfn:
                kept.append((low, min(high, gfn), flags, offset))
            if high > end:
                kept.append((max(low, end), high, flags, offset))
            if max(low, gfn) < min(high, end):
                out.append((max(low, gfn), min(high, end), flags, offset))
        self.ranges = kept
        return out

    def at(self, gfn: int) -> tuple[int, int | None]:
        for low, high, flags, offset in self.ranges:
            if low <= gfn < high:
                return flags, None if offset is None else gfn + offset
        return 0, None

    def count(self, mask: int) -> int:
        return sum(high - low for low, high, flags, _ in self.ranges if flags & mask)


def apply(p2m: P2m, oracle: Oracle, change: tuple[str, int, int, int]) -> None:
    what, gfn, count, offset = change
    end = gfn + count
    if what in ("map", "same"):
        offset = offset if what == "map" else GIGA
        p2m.map(gfn, gfn + offset, count)
        oracle.cut(gfn, end)
        oracle.ranges.append((gfn, end, PRESENT, offset))
    elif what in ("swap", "balloon"):
        flag = Flag.SWAPPED if what == "swap" else Flag.BALLOONED
        p2m.take(gfn, count, flag)
        oracle.cut(gfn, end)
        oracle.ranges.append((gfn, end, flag, None))
    elif what == "unmap":
        p2m.unmap(gfn, count)
        oracle.cut(gfn, end)
    elif what == "one for all":
        count = min(count, MANY)
        p2m.map_same(gfn, offset, count, Flag.SHARED)
        oracle.cut(gfn, gfn + count)
        oracle.ranges += [
            (one, one + 1, PRESENT | Flag.SHARED, offset - one) for one in range(gfn, gfn + count)
        ]
    else:
        on, off = {
            "share": (Flag.SHARED, 0), "log": (Flag.LOGGED, 0), "unshare": (0, Flag.SHARED),
            "free": (0, PROTECTED),
        }[what]  # fmt: skip
        if on:
            p2m.protect(gfn, count, on)
        else:
            p2m.unprotect(gfn, count, off)
        taken = oracle.cut(gfn, end)
        oracle.ranges += [(a, b, (f | on) & ~off, o) for a, b, f, o in taken]


@settings(deadline=None, max_examples=150)
@given(st.lists(changes, max_size=12))
def test_the_p2m_is_a_map_with_states(steps: list[tuple[str, int, int, int]]) -> None:
    p2m, oracle = P2m(), Oracle()
    heard: list[tuple[int, int]] = []
    p2m.watchers.append(heard.extend)
    for step in steps:
        probes = {edge + n for edge in (*EDGES, step[1], step[1] + step[2]) for n in (-2, -1, 0, 1)}
        before, seen = {gfn: oracle.at(gfn) for gfn in probes}, len(heard)
        apply(p2m, oracle, step)
        for gfn in probes:
            if oracle.at(gfn) != before[gfn]:
                assert any(low <= gfn < low + count for low, count in heard[seen:]), hex(gfn)
        for gfn in probes:
            flags, pfn = oracle.at(gfn) if gfn >= 0 else (0, None)
            assert p2m.word(gfn) & 0xFFF == flags, (step, hex(gfn))
            assert p2m.lookup(gfn) == pfn
            assert p2m.is_protected(gfn) == bool(flags & PROTECTED)
        assert (p2m.protected, p2m.absent) == (oracle.count(PROTECTED), oracle.count(ABSENT))
        check_form(p2m)
    assert sum(extent.frames for extent in p2m) == oracle.count(PRESENT)
    for extent in p2m:
        assert oracle.at(extent.gfn)[1] == extent.pfn
        assert oracle.at(extent.gfn + extent.frames - 1)[1] == extent.pfn + extent.frames - 1
    for one, two in pairwise(p2m):
        assert one.gfn + one.frames <= two.gfn
        joined = one.gfn + one.frames == two.gfn and one.pfn + one.frames == two.pfn
        assert not joined
    cut = p2m.within(5, 10)
    assert {e.gfn + i: e.pfn + i for e in cut for i in range(e.frames)} == {
        gfn: oracle.at(gfn)[1] for gfn in range(5, 15) if oracle.at(gfn)[1] is not None
    }


def check_form(p2m: P2m) -> None:
    """What is one row is kept as one word, and the counts of breaks are what they should be."""
    arrays = 0
    for number, giga in p2m._gigas.items():
        if isinstance(giga, int):
            assert giga & RAM
            continue
        rows = [isinstance(block, int) for block in giga]
        broken = sum(
            not (isinstance(a, int) and isinstance(b, int) and b - a == FRAMES << 12)
            for a, b in pairwise(giga)
        )
        assert p2m._breaks[number] == broken > 0
        for n, block in enumerate(giga):
            if not isinstance(block, int):
                arrays += 1
                inside = sum(b - a != 4096 for a, b in pairwise(block))
                assert p2m._breaks_in[number << 9 | n] == inside > 0
            gfn = (number << 9 | n) << 9
            assert p2m.uniform(gfn, 2) == (block if rows[n] else None)
        assert p2m.uniform(number << 18, 3) is None
    assert arrays == len(p2m._breaks_in)
    assert len(p2m._breaks) == sum(isinstance(giga, list) for giga in p2m._gigas.values())


def test_a_large_page_may_map_what_is_one_row() -> None:
    p2m = P2m()
    p2m.map(0, GIGA, GIGA)
    assert p2m.uniform(0, 3) == GIGA << 12 | PRESENT
    assert p2m.uniform(512, 2) == GIGA + 512 << 12 | PRESENT
    p2m.protect(700)
    assert p2m.uniform(0, 3) is None
    assert p2m.uniform(512, 2) is None
    assert p2m.uniform(1024, 2) == GIGA + 1024 << 12 | PRESENT
    p2m.protect_all(Flag.SEALED)
    assert p2m.uniform(0, 3) == GIGA << 12 | PRESENT | Flag.SEALED
    assert p2m.uniform(0, 4) is None
    assert p2m.uniform(GIGA << 9, 4) == 0


@pytest.mark.parametrize(
    ("gfn", "count", "pfn"), [(-1, 1, 0), (0, 0, 0), (0, -1, 0), (0, 1, -1), (MOST, 1, 0),
                              (0, 2, MOST - 1)]
)  # fmt: skip
def test_numbers_that_are_no_frames_are_refused(gfn: int, count: int, pfn: int) -> None:
    p2m = P2m()
    with pytest.raises(ValueError, match="expected at least one"):
        p2m.map(gfn, pfn, count)
    assert list(p2m) == []
    with pytest.raises(ValueError, match="which protect"):
        p2m.protect(0, 1, PRESENT)


class Recorder:
    """An owner that writes down what it is asked, and does it."""

    def __init__(self, flag: int, refuses: bool = False) -> None:
        self.flag, self.refuses = flag, refuses
        self.asked: list[tuple[str, int]] = []

    def write(self, p2m: P2m, gfn: int) -> None:
        self.asked.append(("write", gfn))
        if not self.refuses:
            p2m.unprotect(gfn, 1, self.flag)

    def touch(self, p2m: P2m, gfn: int) -> None:
        self.asked.append(("touch", gfn))
        if not self.refuses:
            p2m.map(gfn, gfn + 100, 1, Flag.SEALED)


def test_every_owner_is_asked_and_watchers_hear_once() -> None:
    p2m, heard = P2m(), list[Any]()
    first, second = Recorder(Flag.SHARED), Recorder(Flag.LOGGED)
    p2m.owners = {Flag.SHARED: first, Flag.LOGGED: second}
    p2m.map(0, 100, 4, Flag.SHARED)
    p2m.protect(2, 2, Flag.LOGGED)
    p2m.watchers.append(heard.append)
    assert p2m.touch(0)
    assert first.asked == second.asked == heard == []
    assert p2m.touch(2, write=True)
    assert first.asked == second.asked == [("write", 2)]
    assert heard == [[(2, 1)]]
    assert (p2m.is_protected(2), p2m.is_protected(3), p2m.protected) == (False, True, 3)


def test_a_frame_that_comes_back_protected_is_asked_for_twice() -> None:
    p2m = P2m()
    swap, seal = Recorder(Flag.SWAPPED), Recorder(Flag.SEALED)
    p2m.owners = {Flag.SWAPPED: swap, Flag.SEALED: seal}
    p2m.take(7, 1, Flag.SWAPPED)
    assert p2m.lookup(7) is None
    assert p2m.touch(7, write=True)
    assert (swap.asked, seal.asked) == ([("touch", 7)], [("write", 7)])
    assert p2m.lookup(7) == 107


def test_who_refuses_is_believed_and_who_is_missing_is_named() -> None:
    p2m = P2m()
    p2m.map(0, 100, 2, Flag.LOGGED)
    p2m.take(1, 1, Flag.BALLOONED)
    p2m.owners = {f: Recorder(f, refuses=True) for f in (Flag.LOGGED, Flag.BALLOONED)}
    assert not p2m.touch(0, write=True)
    assert not p2m.touch(1)
    assert not p2m.touch(2)
    p2m.owners.clear()
    with pytest.raises(GuestMemoryError, match="nobody owns"):
        p2m.touch(1)
    with pytest.raises(GuestMemoryError, match="nobody owns"):
        p2m.touch(0, write=True)


def test_a_batch_is_heard_at_its_end_as_runs_in_order() -> None:
    p2m, heard = P2m(), list[Any]()
    p2m.watchers += [heard.append, heard.append]
    with p2m.batch():
        p2m.map(9, 9, 2)
        with p2m.batch():
            p2m.map(5, 5, 1)
            p2m.map(6, 60, 1)
        p2m.protect(10, 1)
        assert heard == []
    assert heard == [[(5, 2), (9, 2)]] * 2
    with pytest.raises(KeyError), p2m.batch():
        p2m.unmap(5, 1)
        raise KeyError
    assert heard[2:] == [[(5, 1)]] * 2
    with p2m.batch():
        pass
    p2m.protect(10, 1)  # as it is
    assert len(heard) == 4


def test_protecting_all_is_one_event() -> None:
    p2m, heard = P2m(), list[Any]()
    p2m.map(0, GIGA, 65536)
    p2m.map(GIGA, 2 * GIGA, FRAMES)
    p2m.watchers.append(heard.append)
    p2m.protect_all(Flag.SHARED)
    p2m.protect_all(Flag.SHARED)
    assert heard == [[(0, 65536), (GIGA, FRAMES)]]
    p2m.unprotect_all(Flag.SHARED)
    assert p2m.protected == 0


def test_a_moved_frame_keeps_what_others_want_of_it() -> None:
    p2m = P2m()
    p2m.map(3, 3, 1, Flag.SHARED | Flag.LOGGED)
    p2m.move(3, 50, off=Flag.SHARED)
    assert p2m.word(3) == 50 << 12 | PRESENT | Flag.LOGGED
    p2m.map(3, 60, 1)
    assert p2m.word(3) == 60 << 12 | PRESENT


def test_tracers_hear_of_what_they_trace() -> None:
    class Traces:
        def __init__(self, *gfns: int) -> None:
            self.traced, self.heard = set(gfns), list[tuple[int, int]]()

        def table_written(self, gpa: int, length: int) -> None:
            self.heard.append((gpa, length))

    p2m, one, two = P2m(), Traces(1), Traces(1, 2)
    p2m.tracers += [one, two]
    p2m.written(0x1008, 8)
    p2m.written(0x2000, 4)
    p2m.written(0x3000, 4)
    assert one.heard == [(0x1008, 8)]
    assert two.heard == [(0x1008, 8), (0x2000, 4)]
