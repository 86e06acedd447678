"""Copy-on-write: several p2ms on one host, written by all; nothing leaks, nothing is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.arch.address import PAGE
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import Flag

MEGA = 1 << 20


def origin(host: Host, size: int = 4 * MEGA) -> GuestMemory:
    made = GuestMemory(host, size)
    made.spare.close()  # so that all frames counted here are guests' memory
    made.populate()
    return made


def clone(memory: GuestMemory) -> GuestMemory:
    made = GuestMemory(memory.host, memory.size)
    made.spare.close()
    CopyOnWrite(memory.host).clone(memory.p2m, made.p2m)
    return made


def close(memory: GuestMemory) -> None:
    CopyOnWrite(memory.host).release(memory.p2m)


def test_a_write_is_seen_by_the_writer_alone() -> None:
    host = Host("16M")
    free = host.frames.free_count
    first = origin(host)
    first.write(0x5000, b"before")
    second = clone(first)
    assert second.read(0x5000, 6) == b"before"
    assert first.hpa(0x5000) == second.hpa(0x5000)
    second.write(0x5002, b"!")
    assert (first.read(0x5000, 6), second.read(0x5000, 6)) == (b"before", b"be!ore")
    pfn = first.p2m.lookup(5)
    assert pfn is not None
    assert host.frames.references(pfn) == 1
    first.write(0x5000, b"B")  # the last owner needs no copy
    assert first.p2m.lookup(5) == pfn
    assert not first.p2m.is_protected(5)
    assert host.frames.free_count == free - 1024 - 1
    close(second)
    close(first)
    assert host.frames.free_count == free


def test_frames_that_were_never_written_stay_holes() -> None:
    host = Host("64M")
    first = origin(host, 32 * MEGA)
    first.write(0, bytes(range(256)) * 16)
    before = host.memory.resident_bytes()
    clones = [clone(first) for _ in range(4)]
    assert host.memory.resident_bytes() == before
    for one in clones:
        one.p2m.touch(9, write=True)  # a hole, copied
        one.p2m.touch(0, write=True)
    assert host.memory.resident_bytes() == before + 4 * PAGE
    for one in clones:
        assert one.read(0, 4) == b"\0\1\2\3"
        close(one)
    assert host.memory.resident_bytes() == before


def test_sharing_all_is_one_event_and_brings_back_what_was_taken() -> None:
    class Swap:
        def write(self, p2m: P2m, gfn: int) -> None:
            raise AssertionError

        def touch(self, p2m: P2m, gfn: int) -> None:
            p2m.map(gfn, host.frames.allocate(), 1)

    host = Host("64M")
    first = origin(host, 32 * MEGA)
    first.p2m.owners[Flag.SWAPPED] = Swap()
    pfn = first.p2m.lookup(9)
    assert pfn is not None
    first.p2m.take(9, 1)
    host.release(pfn)
    heard: list[int] = []
    first.p2m.watchers.append(lambda runs: heard.append(len(runs)))
    free = host.frames.free_count
    second = clone(first)
    assert heard == [1, 1]  # frame 9 came back; all were protected
    assert first.p2m.protected == second.p2m.protected == 32 * MEGA // PAGE
    close(second)
    assert list(second.p2m) == []
    assert host.frames.free_count == free - 1
    first.write(0x3000, b"x")
    assert host.frames.free_count == free - 1


def test_a_clone_is_not_protected_for_other_reasons_and_needs_an_empty_place() -> None:
    host = Host("16M")
    first = origin(host)
    first.p2m.protect(7, 3, Flag.LOGGED)
    second = clone(first)
    assert second.p2m.word(7) == first.p2m.word(7) & ~Flag.LOGGED
    assert second.p2m.uniform(0, 2) == (first.p2m.word(0))
    with pytest.raises(ValueError, match="expected an empty one"):
        CopyOnWrite(host).clone(first.p2m, second.p2m)


def test_a_copy_is_still_what_others_protect() -> None:
    class Refuses:
        def write(self, p2m: P2m, gfn: int) -> None:
            pass

        def touch(self, p2m: P2m, gfn: int) -> None:
            raise AssertionError

    host = Host("16M")
    first = origin(host)
    second = clone(first)
    first.p2m.owners[Flag.SEALED] = Refuses()
    first.p2m.protect(7)
    assert not first.p2m.touch(7, write=True)
    assert first.p2m.word(7) & 0xFC0 == Flag.SEALED
    assert first.p2m.lookup(7) != second.p2m.lookup(7)


def test_what_is_not_there_cannot_be_copied() -> None:
    cow, p2m = CopyOnWrite(Host("1M")), P2m()
    with pytest.raises(GuestMemoryError, match="no host frame"):
        cow.write(p2m, 5)
    with pytest.raises(GuestMemoryError, match="not to be shared"):
        cow.touch(p2m, 5)


WHERE = st.sampled_from([0, 8, 0xFF8, 0x1000, 0x1FF000, 0x200000, 0x3FFFF8])
steps = st.tuples(
    st.sampled_from(["write", "write", "write", "clone", "close"]),
    st.integers(0, 5), WHERE, st.integers(1, 1 << 64) , st.sampled_from([1, 8, 4096, 9000]),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.lists(steps, max_size=30))
def test_contents_never_leak_and_counts_end_at_zero(
    todo: list[tuple[str, int, int, int, int]],
) -> None:
    host, size = Host("64M"), 4 * MEGA
    free = host.frames.free_count
    alive = [(origin(host, size), bytearray(size))]
    for what, n, gpa, value, length in todo:
        memory, expected = alive[n % len(alive)]
        if what == "clone" and len(alive) < 5:
            alive.append((clone(memory), bytearray(expected)))
        elif what == "close" and len(alive) > 1:
            close(memory)
            del alive[n % len(alive)]
        elif what == "write":
            data = (value.to_bytes(9, "little") * 1000)[: min(length, size - gpa)]
            memory.write(gpa, data)
            expected[gpa : gpa + len(data)] = data
        for memory, expected in alive:
            for start, end in ((0, 0x4000), (0x1FF000, 0x205000), (0x3FF000, 0x400000)):
                assert memory.read(start, end - start) == expected[start:end]
    names: dict[int, int] = {}
    for memory, _ in alive:
        for extent in memory.p2m:
            for pfn in range(extent.pfn, extent.pfn + extent.frames):
                names[pfn] = names.get(pfn, 0) + 1
    assert all(host.frames.references(pfn) == count for pfn, count in names.items())
    assert host.frames.free_count == free - len(names)
    for memory, _ in alive:
        shared = [gfn for gfn, word, _ in memory.p2m.pieces() if word & Flag.SHARED]
        assert bool(shared) == bool(memory.p2m.protected)
        close(memory)
    assert host.frames.free_count == free
