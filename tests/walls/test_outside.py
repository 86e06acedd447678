"""What a process may have, measured from outside: a leak of each sort is seen.  See `outside`."""

import gc
import mmap

import pytest

from tests.walls.outside import BESIDE, EACH, ON_THE_WAY, Limit
from understudy.arch.address import PAGE
from understudy.host import Host

FRAMES = 2 * ON_THE_WAY


def test_what_a_vm_has_is_there() -> None:
    with Host(ram="64M") as host:
        limit = Limit(host)
        vm = host.vm(8 << 20)
        for gpa in range(0, 8 << 20, PAGE):
            vm.memory.write(gpa, b"something")
        limit.look()
        assert 8 << 20 <= limit.most["memfd:understudy"] < 12 << 20


def test_frames_that_are_free_but_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(ram="64M") as host:
        limit, first = Limit(host), host.frames.allocate(FRAMES)
        host.memory.write(first * PAGE, bytes([1]) * (FRAMES * PAGE))
        limit.look()
        monkeypatch.setattr(host.frames, "_discard", lambda pfn, count: None)
        host.frames.free(first, FRAMES)
        with pytest.raises(AssertionError, match="memfd:understudy: "):
            limit.look()


@pytest.mark.parametrize("where", ["the heap", "a mapping that others could have"])
def test_memory_beside_the_hosts(where: str) -> None:
    with Host(ram="64M") as host:
        gc.collect()  # or what others have left goes now
        limit, size = Limit(host), 2 * (BESIDE + EACH)
        limit.look()
        if where == "the heap":
            kept: bytes | mmap.mmap = bytes([1]) * size
        else:
            kept = mmap.mmap(-1, size)  # shared
            kept.write(bytes([1]) * size)
        with pytest.raises(AssertionError, match="own: "):
            limit.look()
        del kept
