"""Swapping: contents come back, whoever misses them; what may not go stays; bad files.

Source: none.  Counts are asserted.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matrix import programs as p
from tests.matrix.test_paging_costs import TECHNIQUES, Bench
from tests.unit.overcommit.test_sharing import FRAMES, A, guest
from understudy.arch.address import PAGE
from understudy.machine.ballooned import Ballooned
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import P2m
from understudy.machine.words import Flag
from understudy.overcommit.sharing import Sharing, use
from understudy.overcommit.swap import Swap
from understudy.overcommit.swap_file import SwapError
from understudy.overcommit.victims import Victims
from understudy.verdict import StopKind
from understudy.vm import VM


@pytest.mark.parametrize("policy", Victims.ALL)
def test_contents_come_back(policy: str) -> None:
    host = Host("1M")
    one = guest(host)
    for gfn in range(1, FRAMES):
        one.write(gfn * PAGE, bytes([gfn]) * PAGE)
    with Swap(host, 1 << 20, policy) as swap:
        swap.join(one.p2m)
        free = host.frames.free_count
        assert swap.reclaim(one.p2m, 10) == 10
        assert swap.reclaim(one.p2m, 100) == FRAMES - 10
        assert (swap.swapped, swap.written) == (FRAMES, FRAMES)
        assert host.frames.free_count == free + FRAMES
        assert use(host, [one.p2m]).absent == FRAMES
        for gfn in range(FRAMES):
            assert one.read(gfn * PAGE, PAGE) == bytes([gfn]) * PAGE
        assert (swap.swapped, swap.read) == (0, FRAMES)
        assert swap.reclaim(one.p2m, 3) == 3
        swap.leave(one.p2m)
        assert one.p2m.absent == 0


def test_the_oldest_goes_first() -> None:
    host = Host("1M")
    one = guest(host)
    with Swap(host, 1 << 20, "oldest") as swap:
        swap.join(one.p2m)
        swap.reclaim(one.p2m, FRAMES)
        for gfn in (7, 3, 5):
            one.read(gfn * PAGE, 1)
        swap.reclaim(one.p2m, 1)
        assert one.p2m.lookup(7) is None
        assert one.p2m.lookup(3) is not None


def test_what_is_pinned_shared_or_full_stays() -> None:
    host = Host("1M")
    one = guest(host)
    one.write(0, b"".join(bytes([gfn + 1]) * PAGE for gfn in range(FRAMES)))
    one.write(8 * PAGE, A * 2)
    sharing = Sharing(host)
    sharing.join(one.p2m)
    assert sharing.scan(100) == 1
    with Swap(host, 4 * PAGE) as swap:
        swap.join(one.p2m)
        with pytest.raises(SwapError, match="full"):
            swap.reclaim(one.p2m, 100)
        assert swap.swapped == 4
        assert one.read(5 * PAGE, 2) == b"\6\6"
        swap.leave(one.p2m)
    assert one.read(0, FRAMES * PAGE)[: 8 * PAGE : PAGE] == bytes(range(1, 9))


def test_a_clone_for_which_there_is_no_copy_of_what_a_device_uses() -> None:
    """Nothing is left of it, and the device's frame is where it was."""
    host = Host("1M")
    one, copies = guest(host), CopyOnWrite(host)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)
        pfns = {gfn: swap.pin(one.p2m, gfn) for gfn in (2, 3)}
        rest, two = host.frames.free_count, P2m()
        taken = [host.frames.allocate() for _ in range(rest - 1)]
        with pytest.raises(OutOfFrames):
            copies.clone(one.p2m, two)
        assert (list(two), host.frames.free_count) == ([], 1)
        one.write(2 * PAGE, b"by the guest")
        assert {gfn: one.p2m.lookup(gfn) for gfn in pfns} == pfns
        for pfn in taken:
            host.frames.free(pfn, 1)
        for gfn, pfn in pfns.items():
            swap.unpin(one.p2m, gfn, pfn)
        assert host.frames.free_count == rest


def test_what_a_device_uses_is_not_shared() -> None:
    """It writes without asking the p2m."""
    host = Host("1M")
    one, sharing = guest(host), Sharing(host)
    sharing.join(one.p2m)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)
        pfn = swap.pin(one.p2m, 2)
        assert sharing.scan(FRAMES) == FRAMES - 2
        host.memory.write(pfn << 12, b"by a device")
        assert [one.read(gfn * PAGE, 11) for gfn in (1, 2)] == [bytes(11), b"by a device"]
        host.memory.write(pfn << 12, bytes(11))
        swap.unpin(one.p2m, 2, pfn)
        assert sharing.scan(FRAMES) == 1


def test_memory_that_was_cleared_leaves_nothing_in_the_file() -> None:
    """As a reset does it; the file has room for one memory, and takes it again."""
    host = Host("1M")
    one = guest(host)
    with Swap(host, FRAMES * PAGE) as swap:
        swap.join(one.p2m)
        for _ in range(3):
            one.write(0, b"a" * FRAMES * PAGE)
            assert swap.reclaim(one.p2m, FRAMES) == FRAMES
            one.clear()
            assert swap.swapped == 0
            assert one.read(0, FRAMES * PAGE) == bytes(FRAMES * PAGE)


def test_what_a_device_uses_stays() -> None:
    host = Host("1M")
    one = guest(host)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)
        pfn = swap.pin(one.p2m, 2)
        assert swap.reclaim(one.p2m, 100) == FRAMES - 1
        host.memory.write(pfn << 12, b"by a device")
        assert one.read(2 * PAGE, 11) == b"by a device"
        swap.unpin(one.p2m, 2, pfn)
        assert swap.reclaim(one.p2m, 100) == 1
        assert one.read(2 * PAGE, 11) == b"by a device"


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_is_like_another_is_shared_and_not_written(is_shared: bool) -> None:
    """Frames that are in both guests need no room in the file, and nothing is read back."""
    host = Host("1M")
    one, two, sharing = guest(host), guest(host), Sharing(host)
    for memory in (one, two):
        for gfn in range(FRAMES):
            memory.write(gfn * PAGE, bytes([gfn + 1]) * PAGE)
        sharing.join(memory.p2m)
    sharing.scan(FRAMES)  # the first one's are hints
    assert sharing.merged == 0
    with Swap(host, 1 << 20, sharing=sharing if is_shared else None) as swap:
        free = host.frames.free_count
        swap.join(two.p2m)
        assert swap.reclaim(two.p2m, FRAMES) == FRAMES
        assert host.frames.free_count == free + FRAMES
        assert (swap.written, sharing.merged) == ((0, FRAMES) if is_shared else (FRAMES, 0))
        assert two.read(0, FRAMES * PAGE) == one.read(0, FRAMES * PAGE)
        assert swap.read == swap.written


def test_a_file_that_was_cut_stops_who_misses_it_alone() -> None:
    with (
        Host("64M") as host,
        VM("2M", host=host) as one,
        VM("2M", host=host) as two,
        Swap(host, 8 << 20) as swap,
    ):
        for vm in (one, two):
            p.start(vm, p.READ_DATA)
        one.vcpus[0].leave_guest()
        swap.join(one.memory.p2m)
        assert swap.reclaim(one.memory.p2m, 1 << 20) > 500
        os.ftruncate(swap.file._file.fileno(), 0)
        stop = one.go(wall_seconds=60)
        assert stop.kind == StopKind.ERROR
        assert "swap file was cut" in stop.detail
        assert two.go(budget=1).kind == StopKind.BUDGET


def test_a_disk_that_is_full_takes_nothing_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host("1M")
    one = guest(host)
    one.write(PAGE, A)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)
        free = host.frames.free_count
        with monkeypatch.context() as patch, Path("/dev/full").open("r+b", buffering=0) as full:
            patch.setattr(swap.file, "_file", full)
            with pytest.raises(SwapError, match=r"cannot be written \(No space left on device"):
                swap.reclaim(one.p2m, FRAMES)
        assert one.p2m.lookup(1) is not None, "it stays; frames of zeros need no room"
        assert one.read(PAGE, PAGE) == A
        assert (swap.in_file, host.frames.free_count) == (0, free + swap.swapped)
        swap.reclaim(one.p2m, FRAMES)
        assert (swap.swapped, swap.in_file) == (FRAMES, 1)
        swap.leave(one.p2m)
        assert one.read(PAGE, PAGE) == A


def test_a_frame_that_cannot_be_read_in_is_out_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("1M")
    one = guest(host)
    one.write(PAGE, A)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)
        swap.reclaim(one.p2m, FRAMES)
        free = host.frames.free_count
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", unreadable)
            with pytest.raises(SwapError, match=r"Input/output error\): guest frame 0x1 is in it"):
                one.read(PAGE, PAGE)
            assert one.read(2 * PAGE, 1) == bytes(1), "of zeros: the file has no part in it"
        assert (host.frames.free_count, swap.swapped) == (free - 1, FRAMES - 1)
        assert one.read(PAGE, PAGE) == A
        swap.leave(one.p2m)


def unreadable(*_: object) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_file_has_no_name_that_could_be_left_over(tmp_path: Path) -> None:
    with Swap(Host("1M"), 1 << 20, folder=tmp_path) as swap:
        assert os.fstat(swap.file._file.fileno()).st_nlink == 0
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_guest_goes_on_with_its_frames_out(paging: str) -> None:
    """Tables and all: it reads and writes what it has written, before and after."""
    bench = Bench(paging, "Intel 64")
    memory = bench.vm.memory
    del memory.p2m.owners[Flag.SWAPPED]  # the bench's own
    with Swap(bench.vm.host, memory.size) as swap:
        swap.join(memory.p2m)
        for _ in range(2):
            bench.vcpu.leave_guest()
            before = memory.read(0, memory.size)
            assert swap.reclaim(memory.p2m, 1 << 20) > 1000
            bench.use()
            assert 0 < swap.swapped < memory.size // PAGE
            read = swap.read
            bench.use()
            assert swap.read == read
            assert memory.read(0, memory.size) == before
            assert swap.swapped == 0
        swap.leave(memory.p2m)
        bench.close()


@pytest.mark.parametrize("keep", ["save", "snapshot"])
def test_a_snapshot_has_what_is_out(keep: str) -> None:
    with Host("64M") as host, VM("2M", host=host) as one, Swap(host, 8 << 20) as swap:
        p.start(one, p.READ_DATA)
        before = one.memory.read(0, one.memory.size)
        swap.join(one.memory.p2m)
        swap.reclaim(one.memory.p2m, 1 << 20)
        if keep == "save":
            again = VM.restore(one.save(), host=host)
        else:
            with one.snapshot() as image:
                again = image.restore(host=host)
        with again:
            assert again.memory.read(0, again.memory.size) == before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, 15), st.sampled_from("ab0")),
        st.tuples(st.just("read"), st.integers(0, 1), st.integers(0, 15), st.just("")),
        st.tuples(st.just("scan"), st.integers(1, 40), st.just(0), st.just("")),
        st.tuples(st.just("swap"), st.integers(0, 1), st.integers(1, 16), st.just("")),
        st.tuples(st.just("dma"), st.integers(0, 1), st.integers(0, 15), st.sampled_from("cd")),
    ),
    max_size=60,
)


def play(steps: list[tuple[str, int, int, str]], make: Callable[[Host, Sharing], Swap]) -> None:
    """Two guests; an oracle of bytes, and an audit of frames.  A device has one frame at a time."""
    host = Host("1M")
    guests, sharing = [guest(host), guest(host)], Sharing(host)
    contents = [[bytes(PAGE)] * FRAMES for _ in guests]
    frames = host.frames.free_count + 2 * FRAMES
    device: tuple[P2m, int, int] | None = None
    with make(host, sharing) as swap:
        for one in guests:
            sharing.join(one.p2m)
            swap.join(one.p2m)
        for what, n, gfn, value in steps:
            one = guests[n & 1]
            data = value.replace("0", "\0").encode() * PAGE
            if what == "scan":
                sharing.scan(n)
            elif what == "swap":
                swap.reclaim(one.p2m, gfn)
            elif what == "read":
                assert one.read(gfn * PAGE, PAGE) == contents[n][gfn]
            elif what == "write":
                one.write(gfn * PAGE, data)
                contents[n][gfn] = data
            else:
                if device is not None:
                    swap.unpin(*device)
                device = (one.p2m, gfn, swap.pin(one.p2m, gfn))
                swap.reclaim(one.p2m, FRAMES)
                host.memory.write(device[2] << 12, data)
                contents[n][gfn] = data
        if device is not None:
            swap.unpin(*device)
        told = use(host, [one.p2m for one in guests])
        assert told.absent == swap.swapped
        assert told.own + told.shared + told.absent == 2 * FRAMES
        assert host.frames.free_count + told.consumed == frames
        for one, expected in zip(guests, contents, strict=True):
            assert [one.read(gfn * PAGE, PAGE) for gfn in range(FRAMES)] == expected


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_no_byte_and_no_frame_is_lost(steps: list[tuple[str, int, int, str]]) -> None:
    play(steps, lambda host, sharing: Swap(host, 1 << 20))


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_nor_with_a_look_before(steps: list[tuple[str, int, int, str]]) -> None:
    play(steps, lambda host, sharing: Swap(host, 1 << 20, sharing=sharing))


class Unpinned(Swap):
    """Swaps out what a device uses."""

    def _may_go(self, p2m: P2m, gfn: int) -> bool:
        return p2m.lookup(gfn) is not None


def test_a_planted_fault_is_found() -> None:
    steps = [("write", 0, 3, "a"), ("dma", 0, 3, "c")]
    with pytest.raises(AssertionError):
        play(steps, lambda host, sharing: Unpinned(host, 1 << 20))
    play(steps, lambda host, sharing: Swap(host, 1 << 20))


def test_a_copy_has_what_is_out_and_not_what_a_device_writes() -> None:
    host = Host("1M")
    one, two = guest(host), GuestMemory(host, FRAMES * PAGE)
    for gfn in range(FRAMES):
        one.write(gfn * PAGE, bytes([gfn + 1]) * PAGE)
    with Swap(host, FRAMES * PAGE) as swap:
        swap.join(one.p2m)
        pfn = swap.pin(one.p2m, 2)
        swap.reclaim(one.p2m, 5)
        CopyOnWrite(host).clone(one.p2m, two.p2m)
        assert (swap.swapped, swap.in_file, swap.read) == (10, 5, 0)
        host.memory.write(pfn << 12, b"by a device")
        assert two.read(2 * PAGE, 3) == b"\3\3\3"
        one.write(2 * PAGE + 100, b"by the guest")
        assert host.memory.read(pfn << 12, 11) == one.read(2 * PAGE, 11) == b"by a device"
        assert host.memory.read((pfn << 12) + 100, 12) == b"by the guest", "the frame is the same"
        swap.unpin(one.p2m, 2, pfn)
        for gfn in range(3, FRAMES):
            assert one.read(gfn * PAGE, PAGE) == two.read(gfn * PAGE, PAGE)
        assert (swap.swapped, swap.in_file) == (0, 0)
        two.close()
        swap.leave(one.p2m)


def test_what_goes_into_the_balloon_leaves_the_file() -> None:
    host = Host("1M")
    one = guest(host)
    pages = Ballooned(one)
    for gfn in range(FRAMES):
        one.write(gfn * PAGE, bytes([gfn + 1]) * PAGE)
    with Swap(host, FRAMES * PAGE) as swap:
        swap.join(one.p2m)
        assert swap.reclaim(one.p2m, FRAMES) == swap.in_file == FRAMES
        pages.inflate([(0, 3), (5, 1)])
        pages.report([(6, 2)])
        assert (pages.ballooned, pages.free, swap.swapped, swap.in_file) == (
            4, 2, FRAMES - 6, FRAMES - 6
        )  # fmt: skip
        assert one.read(0, 3) == bytes(3)
        assert one.read(3 * PAGE, 3) == b"\4\4\4"
        swap.leave(one.p2m)
