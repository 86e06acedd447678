"""The host's structures, and what becomes of what it is given back."""

import gc
import weakref

import pytest

from tests.unit.fakes import fake_machine
from understudy.machine.host import Host


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


def test_contents_go_with_the_last_owner() -> None:
    with fake_machine():
        host = Host("1M")
        hpa = host.frame()
        host.memory.write(hpa, b"x")
        host.frames.share(hpa >> 12, 1)
        host.release(hpa >> 12)
        assert host.memory.read(hpa, 1) == b"x"
        host.release(hpa >> 12)
        assert host.memory.read(hpa, 1) == b"\0"
        with pytest.raises(ValueError, match="free already"):
            host.release(hpa >> 12)


def test_a_host_goes_without_a_garbage_collection() -> None:
    gc.disable()
    try:
        host = Host("1M")
        host.frame()
        memory, gone = weakref.ref(host.frames), weakref.ref(host)
        del host
        assert gone() is None
        assert memory() is None
    finally:
        gc.enable()
