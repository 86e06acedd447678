"""The frame allocator and the host's structures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes import fake_machine
from understudy.machine.frames import Frames, OutOfFrames
from understudy.machine.host import Host
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


def test_a_frame_cannot_be_freed_twice() -> None:
    frames = Frames(0, 10)
    first = frames.allocate(4)
    frames.free(first, 4)
    with pytest.raises(ValueError, match="free already"):
        frames.free(first, 1)


def test_frames_in_use_cannot_be_claimed() -> None:
    frames = Frames(0, 10)
    frames.claim(3, 3)
    for first in (2, 3, 5):
        with pytest.raises(OutOfFrames):
            frames.claim(first, 2)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.sampled_from([1, 2, 8])), max_size=40)
)
def test_no_frame_has_two_owners(steps: list[tuple[bool, int, int]]) -> None:
    frames, owned = Frames(1, 63), list[tuple[int, int]]()
    for give_back, count, align in steps:
        if give_back and owned:
            frames.free(*owned.pop(count % len(owned)))
            continue
        try:
            first = frames.allocate(count, align)
        except OutOfFrames:
            continue
        assert first % align == 0
        owned.append((first, count))
    every = [pfn for first, count in owned for pfn in range(first, first + count)]
    assert len(every) == len(set(every))
    assert all(1 <= pfn < 64 for pfn in every)
    assert frames.free_count == 63 - len(every)


def test_structures_are_zeroed_frames_and_never_frame_zero() -> None:
    with fake_machine():
        host = Host("1M")
        first = host.frame()
        host.memory.write(first, b"x")
        host.release(first >> 12)
        assert host.frame() == first != 0
        assert host.memory.read(first, 1) == b"\0"
        with pytest.raises(ValueError, match="at least"):
            Host(4096)
