"""Frames that were shared, and are not any more, come into a row: a large page maps them again.

Source: none.  What is asserted: contents, frames that are free, which large pages are whole.
"""

import pytest

import understudy.overcommit.gathering
from tests.matrix import programs as p
from understudy.arch.address import PAGE
from understudy.host import Host
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host as Computer
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import P2m
from understudy.machine.words import FRAMES
from understudy.overcommit.gathering import Gathering
from understudy.overcommit.stock import SAMPLED_S
from understudy.overcommit.terms import Terms

WRITTEN = (7, 100, 101, FRAMES + 3)


def broken(host: Computer) -> GuestMemory:
    """Three large pages: of the first two some frames are copies that lie elsewhere."""
    memory = GuestMemory(host, 3 * FRAMES * PAGE)
    memory.populate()
    for gfn in range(0, 3 * FRAMES, 5):
        memory.write(gfn * PAGE, gfn.to_bytes(8, "little"))
    copies, image = CopyOnWrite(host), P2m()
    copies.clone(memory.p2m, image)
    for gfn in WRITTEN:
        memory.write(gfn * PAGE, b"a copy")
    copies.release(image)
    memory.p2m.unprotect_all(0xFC0)
    return memory


def wholes(memory: GuestMemory) -> list[bool]:
    """Which large pages are in a row, and where one may begin."""
    rows = [memory.p2m.row(gfn, FRAMES) for gfn in range(0, 3 * FRAMES, FRAMES)]
    return [frames == FRAMES and not word >> 12 & FRAMES - 1 for word, frames in rows]


def test_what_was_broken_is_whole_again() -> None:
    host = Computer("32M")
    memory, gathering = broken(host), Gathering(host)
    before, free = memory.read(0, memory.size), host.frames.free_count
    assert wholes(memory) == [False, False, True]
    assert [gathering.look(memory.p2m) for _ in range(2)] == [2, 0]
    assert wholes(memory) == [True] * 3
    assert (gathering.gathered, host.frames.free_count) == (2, free)
    assert memory.read(0, memory.size) == before


def test_what_is_shared_pinned_or_protected_stays() -> None:
    host = Computer("32M")
    memory, gathering = broken(host), Gathering(host)
    pfn = memory.p2m.lookup(50)
    assert pfn is not None
    host.frames.share(pfn, 1)  # a device uses it
    memory.p2m.protect(FRAMES + 9)
    assert not gathering.look(memory.p2m)
    host.frames.free(pfn, 1)
    assert gathering.look(memory.p2m) == 1
    assert wholes(memory) == [True, False, True]


def test_without_frames_in_a_row_nothing_happens() -> None:
    host = Computer("32M")
    memory, gathering = broken(host), Gathering(host)
    taken = [host.frames.allocate() for _ in range(host.frames.free_count)]
    for pfn in taken[::2]:
        host.frames.free(pfn, 1)
    assert not gathering.look(memory.p2m)
    assert wholes(memory) == [False, False, True]


def test_a_look_ends_after_some_and_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Computer("32M")
    memory, gathering = broken(host), Gathering(host)
    monkeypatch.setattr(understudy.overcommit.gathering, "AT_ONCE", 1)
    assert [gathering.look(memory.p2m) for _ in range(3)] == [1, 1, 0]


def test_a_host_does_it_while_its_guests_go_on() -> None:
    with Host(ram="64M", overcommit=Terms(is_always=True)) as host:
        vm = host.vm("8M", name="one")
        p.start(vm, "eb fe | here: jmp here")
        for gfn in range(0x400, 0x600):  # no two the same: nothing to share
            vm.memory.write(gfn * PAGE, gfn.to_bytes(2, "little"))
        with vm.snapshot():
            vm.memory.write(0x40_0000, b"a copy")
        for _ in range(SAMPLED_S + 3):
            host.run(deadline_ns=host.schedule.time.now() + 1_000_000_000)
        assert host.stock.gathering.gathered > 0
        assert vm.memory.read(0x40_0000, 6) == b"a copy" and vm.ended is None
