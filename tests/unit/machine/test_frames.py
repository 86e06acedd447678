"""The frame allocator against a list of counts; what it must refuse."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.machine.frames import Frames, OutOfFrames
from understudy.quantities import bytes_of


@pytest.mark.parametrize(
    ("text", "size"), [("256M", 256 << 20), ("4G", 4 << 30), ("4096", 4096), ("1k", 1024), (7, 7)]
)
def test_sizes_are_numbers_with_a_unit(text: int | str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1.5G"])
def test_another_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 256M"):
        bytes_of(text)


def test_allocation_is_aligned_and_leaves_the_rest() -> None:
    frames = Frames(1, 1023)
    assert frames.allocate(512, align=512) == 512
    assert frames.free_count == 511
    assert frames.allocate(511) == 1
    with pytest.raises(OutOfFrames, match="0 frames are free"):
        frames.allocate()


def test_runs_are_as_few_as_there_are() -> None:
    frames = Frames(0, 100)
    frames.claim(40, 10)
    assert frames.allocate_runs(80) == [(50, 50), (0, 30)]
    with pytest.raises(OutOfFrames):
        frames.allocate_runs(11)
    assert frames.free_count == 10


def test_frames_in_use_cannot_be_claimed() -> None:
    frames = Frames(0, 10)
    frames.claim(3, 3)
    for first in (2, 3, 5):
        with pytest.raises(OutOfFrames):
            frames.claim(first, 2)


def test_what_is_shared_is_free_after_the_last_owner() -> None:
    gone: list[tuple[int, int]] = []
    frames = Frames(1, 2047, lambda pfn, count: gone.append((pfn, count)))
    first = frames.allocate(1024, 512)
    frames.share(first, 1024)
    frames.share(first + 100, 1)
    assert [frames.references(first + n) for n in (0, 100, 1023, 1024)] == [2, 3, 2, 0]
    frames.free(first, 1024)
    assert (gone, frames.free_count) == ([], 1023)
    frames.free(first, 1024)
    assert gone == [(first, 100), (first + 101, 923)]
    frames.free(first + 100, 1)
    assert gone[2:] == [(first + 100, 1)]
    assert frames.free_count == 2047
    assert frames.allocate(2047) == 1


def test_many_runs_are_shared_or_none() -> None:
    frames = Frames(1, 2047)
    frames.claim(1, 700)
    frames.share_all([(1, 100), (5, 1), (100, 600)])
    assert [frames.references(pfn) for pfn in (1, 5, 100, 699, 700)] == [2, 3, 3, 2, 1]
    for wrong in ((701, 1), (700, 2), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"expected|some of the frames are free"):
            frames.share_all([(1, 5), wrong])
    assert frames.references(1) == 2
    for wrong in ((701, 1), (100, 700), (300, 1)):  # the last one has one owner less than asked
        with pytest.raises(ValueError, match="and 2 more runs: some of the frames are free"):
            frames.free_all([(300, 401), (100, 400), wrong])
    assert [frames.references(pfn) for pfn in (1, 5, 100, 699, 700)] == [2, 3, 3, 2, 1]
    assert frames.free_count == 1347
    frames.free_all([(100, 600), (1, 100), (5, 1), (1, 350), (351, 350)])
    assert frames.allocate(2047) == 1


REFUSED = [
    ("free", 0, 1), ("free", 1, 0), ("free", 1, -1), ("free", 60, 10), ("free", -5, 10),
    ("free", 1, 1 << 60), ("free", 20, 1), ("free", 15, 10), ("share", 20, 1), ("share", 1, 0),
    ("share", 8, 8), ("share", 63, 2), ("claim", 0, 1), ("claim", 20, 0), ("claim", 60, 10),
    ("allocate", 0, 1), ("allocate", -3, 1), ("allocate", 1, 0), ("allocate", 1, -8),
    ("allocate_runs", 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("what", "first", "second"), REFUSED)
def test_nonsense_is_refused_and_changes_nothing(what: str, first: int, second: int) -> None:
    frames = Frames(1, 63)
    frames.claim(10, 10)
    frames.share(12, 2)
    before = [frames.references(pfn) for pfn in range(70)]
    with pytest.raises(ValueError, match=r"expected|free"):
        getattr(frames, what)(first, second)
    assert [frames.references(pfn) for pfn in range(70)] == before
    assert frames.free_count == 53
    assert [frames.allocate(9), frames.allocate(44)] == [1, 20]


def test_a_host_has_no_negative_frames() -> None:
    with pytest.raises(ValueError, match="no negative"):
        Frames(-1, 5)


SIZE = 1500  # frames of the model: three blocks of counts, the last one cut

steps = st.tuples(
    st.sampled_from(["allocate", "allocate", "runs", "claim", "share", "free", "free", "again"]),
    st.integers(0, SIZE + 5), st.sampled_from([1, 1, 2, 5, 60, 511, 512, 1100]),
    st.sampled_from([1, 1, 2, 8, 512]),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(steps, max_size=40))
def test_the_allocator_is_a_list_of_counts(todo: list[tuple[str, int, int, int]]) -> None:
    frames, counts = Frames(1, SIZE - 1), [0] * SIZE
    owned: list[tuple[int, int]] = []  # one entry for each reference

    def take(first: int, count: int) -> None:
        owned.append((first, count))
        for pfn in range(first, first + count):
            counts[pfn] += 1

    for what, at, count, align in todo:
        inside = at >= 1 and at + count <= SIZE
        if what == "allocate":
            fits = [
                pfn for pfn in range(align, SIZE - count + 1, align)
                if not any(counts[pfn : pfn + count])
            ]  # fmt: skip
            if fits:
                assert frames.allocate(count, align) == fits[0]
                take(fits[0], count)
            else:
                with pytest.raises(OutOfFrames):
                    frames.allocate(count, align)
        elif what == "runs" and counts.count(0) > count:
            for first, part in frames.allocate_runs(count, align):
                assert not any(counts[first : first + part])
                take(first, part)
        elif what == "claim" and inside:
            if any(counts[at : at + count]):
                with pytest.raises(OutOfFrames):
                    frames.claim(at, count)
            else:
                frames.claim(at, count)
                take(at, count)
        elif what == "share" and owned:
            run = owned[at % len(owned)]
            frames.share(*run)
            take(*run)
        elif what == "free" and owned:
            first, size = owned.pop(at % len(owned))
            frames.free(first, size)
            for pfn in range(first, first + size):
                counts[pfn] -= 1
        elif what == "again" and inside and not all(counts[at : at + count]):
            with pytest.raises(ValueError, match="free already"):
                frames.free(at, count)
            with pytest.raises(ValueError, match="not shared"):
                frames.share(at, count)
        assert frames.free_count == counts.count(0) - 1
    assert [frames.references(pfn) for pfn in range(SIZE)] == counts
    for run in owned:
        frames.free(*run)
    assert frames.allocate(SIZE - 1) == 1


def test_the_bookkeeping_does_not_grow_with_use() -> None:
    chance = random.Random(3)
    frames = Frames(0, 4096)
    owned = [frames.allocate() for _ in range(2000)]
    for _ in range(20_000):
        at = chance.randrange(len(owned))
        frames.free(owned[at], 1)
        owned[at] = frames.allocate()
    runs = len(frames._free._length)
    heaps = sum(len(heap) for heap in frames._free._heaps.values())
    assert heaps < 4 * runs + 64 * 14
    for pfn in owned:
        frames.free(pfn, 1)
    assert frames._free._length == {0: 4096}
    frames.claim(0, 4096)
    frames.free(0, 4096)
    assert frames._references._blocks == {}


def test_an_exchange_has_room_or_changes_nothing() -> None:
    frames = Frames(1, 1000)
    ours, shared = frames.allocate(600), frames.allocate(300)
    frames.share(shared, 300)
    runs = [(ours, 600), (shared, 300)]
    with frames.exchange(runs, 700):  # 600 that are nobody else's, 100 that are free
        frames.free_all(runs)
        frames.allocate_runs(700)
    assert (frames.free_count, frames.references(shared)) == (0, 1)
    with pytest.raises(OutOfFrames), frames.exchange([(shared, 1)], 2):
        pytest.fail("there is no room")
    assert (frames.free_count, frames.references(shared)) == (0, 1)
