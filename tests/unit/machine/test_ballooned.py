"""Frames that a guest does without: who has them, what is in them later, and what a snapshot keeps.

A model says of each frame what is in it and whose it is; a hostile guest names anything.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.arch.address import PAGE
from understudy.machine import ballooned
from understudy.machine.ballooned import Ballooned
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.machine.words import Flag

FRAMES = 600  # more than one block
RAM = FRAMES * PAGE


def made() -> tuple[Host, GuestMemory, Ballooned]:
    host = Host("16M")
    memory = GuestMemory(host, RAM)
    memory.populate()
    return host, memory, Ballooned(memory)


def test_a_frame_is_the_hosts_until_it_is_touched() -> None:
    host, memory, pages = made()
    memory.write(5 * PAGE, b"x" * 2 * PAGE)
    free, resident = host.frames.free_count, host.memory.resident_bytes()
    assert pages.inflate([(5, 2)]) == 2
    assert host.frames.free_count == free + 2
    assert host.memory.resident_bytes() == resident - 2 * PAGE
    assert pages.inflate([(5, 2)]) == 0, "they are gone already"
    assert pages.deflate([(0, FRAMES)]) == 2 and pages.ballooned == 0
    assert memory.read(6 * PAGE, PAGE) == bytes(PAGE)
    assert host.frames.free_count == free + 1
    assert pages.counts() == {"ballooned": 0, "free": 1, "given": 2, "fetched": 1, "broken": 0}


def test_who_uses_a_page_in_the_balloon_is_counted() -> None:
    _, memory, pages = made()
    pages.inflate([(7, 1)])
    pages.report([(8, 1)])
    memory.write(7 * PAGE, b"a")
    memory.write(8 * PAGE, b"b")
    assert (pages.fetched, pages.broken) == (2, 1)


def test_a_free_page_that_goes_into_the_balloon_is_in_it() -> None:
    _, _, pages = made()
    pages.report([(8, 3)])
    assert pages.inflate([(8, 2)]) == 0 and (pages.ballooned, pages.free) == (2, 1)


def test_of_a_report_with_pages_of_the_balloon_in_it_the_first_runs_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ballooned, "MOST_RUNS", 3)
    _, memory, pages = made()
    pages.inflate([(gfn, 1) for gfn in range(10, 30, 4)])
    assert pages.report([(0, FRAMES)]) == 10 + 3 + 3
    assert (pages.free, pages.ballooned) == (16, 5)
    pages.deflate([(0, FRAMES)])
    memory.read(14 * PAGE, 1)  # one that came back does not keep the others apart
    assert pages.report([(0, FRAMES)]) == FRAMES - 16 - 4


def test_what_is_no_memory_is_no_matter() -> None:
    host, _, pages = made()
    free = host.frames.free_count
    assert pages.inflate([(FRAMES - 1, 5), (1 << 39, 9), (1 << 52, 4), (1 << 40, 1)]) == 1
    assert pages.report([(9, 4), (10, 1), (8, 6)]) == 6, "and what is named twice is given once"
    assert host.frames.free_count == free + 7


def test_shared_frames_are_the_others_still() -> None:
    host, memory, pages = made()
    memory.write(5 * PAGE, b"mine")
    clone = GuestMemory(host, RAM)
    CopyOnWrite(host).clone(memory.p2m, clone.p2m)
    free = host.frames.free_count
    pages.inflate([(5, 1)])
    assert host.frames.free_count == free and clone.read(5 * PAGE, 4) == b"mine"
    assert memory.read(5 * PAGE, 4) == bytes(4)


def test_a_clone_does_without_them_too() -> None:
    host, memory, pages = made()
    pages.inflate([(5, 3)])
    clone = GuestMemory(host, RAM)
    free = host.frames.free_count
    CopyOnWrite(host).clone(memory.p2m, clone.p2m)
    other = Ballooned(clone)
    other.load(json.loads(json.dumps(pages.save())))
    assert (pages.ballooned, other.ballooned) == (3, 3) and host.frames.free_count == free
    clone.write(5 * PAGE, b"x")
    assert (pages.ballooned, other.ballooned) == (3, 2)
    assert memory.p2m.word(5) & Flag.BALLOONED


@pytest.mark.parametrize(
    "runs", [[(FRAMES, 1)], [(3, 0)], [(1 << 41, 1)], [(-1, 1)], [(0, 1 << 60)]]
)
def test_a_snapshot_that_lies_is_refused(runs: list[tuple[int, int]]) -> None:
    host, _, pages = made()
    free = host.frames.free_count
    saved = pages.save() | {"ballooned": [list(run) for run in runs]}
    with pytest.raises(ValueError, match="snapshot"):
        pages.load(saved)
    assert host.frames.free_count == free


def test_it_never_protects() -> None:
    _, memory, pages = made()
    with pytest.raises(GuestMemoryError):
        pages.write(memory.p2m, 3)


NUMBERS = st.integers(0, FRAMES + 3)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["inflate", "deflate", "report", "write", "read", "clone", "again"]),
        NUMBERS, st.integers(1, 40),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_frame_has_two_owners_and_no_byte_is_another(steps: list[tuple[str, int, int]]) -> None:
    host, memory, pages = made()
    inside = [0] * FRAMES
    state = ["here"] * FRAMES
    free = host.frames.free_count
    for n, (kind, gfn, count) in enumerate(steps):
        touched = range(gfn, min(gfn + count, FRAMES))
        if kind in ("inflate", "report"):
            getattr(pages, kind)([(gfn, count), (gfn + count // 2, 1)])
            for f in (*touched, *range(gfn + count // 2, min(gfn + count // 2 + 1, FRAMES))):
                if kind == "inflate":
                    state[f] = "in the balloon"
                elif state[f] == "here":
                    state[f] = "free"
                if state[f] != "here":
                    inside[f] = 0
        elif kind == "deflate":
            pages.deflate([(gfn, count)])
            for f in touched:
                state[f] = "free" if state[f] == "in the balloon" else state[f]
        elif kind == "write":
            for f in touched:
                memory.write(f * PAGE, bytes([n + 1]))
                inside[f], state[f] = n + 1, "here"
        elif kind == "read":
            for f in touched:
                assert memory.read(f * PAGE, 1)[0] == inside[f]
                state[f] = "here"
        elif kind == "clone":
            clone = GuestMemory(host, RAM)
            CopyOnWrite(host).clone(memory.p2m, clone.p2m)
            saved, old = pages.save(), memory
            memory, pages = clone, Ballooned(clone)
            pages.load(saved)
            old.close()
        else:
            pages.load(pages.save())
        assert pages.ballooned == state.count("in the balloon")
        assert pages.free == state.count("free")
        assert host.frames.free_count == free + pages.ballooned + pages.free
        assert memory.p2m.absent == pages.ballooned + pages.free
