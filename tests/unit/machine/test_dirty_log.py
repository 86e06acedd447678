"""The dirty log: writes by the hypervisor, maps, and with copy-on-write beside it.

That a guest's writes are logged is shown under each paging technique in tests/matrix.
"""

import pytest

from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.dirty_log import DirtyLog
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.machine.words import Flag


@pytest.fixture
def memory() -> GuestMemory:
    made = GuestMemory(Host("16M"), 4 << 20)
    made.populate()
    return made


def test_each_frame_is_logged_once_a_round(memory: GuestMemory) -> None:
    log = DirtyLog(memory.p2m)
    memory.write(0x1000, b"before")
    log.start()
    assert log.take() == []
    memory.write(0x7FFF, b"12")
    memory.write(0x3FF000, b"1")
    memory.write(0x8000, b"1")
    memory.read(0x2000, 8)
    assert log.take() == [7, 8, 0x3FF]
    assert log.take() == []
    memory.write(0x8000, b"2")
    assert log.take() == [8]
    log.stop()
    assert memory.p2m.protected == 0
    memory.write(0, b"x")
    with pytest.raises(ValueError, match="start it first"):
        log.take()
    log.stop()


def test_a_frame_that_was_mapped_anew_is_logged(memory: GuestMemory) -> None:
    log = DirtyLog(memory.p2m)
    log.start()
    memory.p2m.map(5, memory.host.frames.allocate(), 1)
    assert log.take() == [5]
    with pytest.raises(ValueError, match="already"):
        DirtyLog(memory.p2m).start()
    with pytest.raises(GuestMemoryError, match="not by the dirty log"):
        log.touch(memory.p2m, 5)


@pytest.mark.parametrize("first", ["log", "share"])
def test_a_shared_frame_is_copied_and_logged(memory: GuestMemory, first: str) -> None:
    cow, log, clone = CopyOnWrite(memory.host), DirtyLog(memory.p2m), GuestMemory(memory.host, 0)
    if first == "log":
        log.start()
    cow.clone(memory.p2m, clone.p2m)
    if first == "share":
        log.start()
    memory.write(0x5000, b"mine")
    assert memory.p2m.lookup(5) != clone.p2m.lookup(5)
    assert memory.p2m.lookup(6) == clone.p2m.lookup(6)
    assert log.take() == [5]
    assert memory.p2m.word(5) & Flag.LOGGED
    memory.write(0x5000, b"more")
    assert log.take() == [5]
    clone.write(0x6000, b"theirs")
    assert log.take() == []
    log.stop()
    assert memory.p2m.is_protected(6)
    assert not memory.p2m.is_protected(5)
    assert memory.read(0x6000, 6) != b"theirs"
