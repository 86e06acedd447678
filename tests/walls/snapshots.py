"""Mutated snapshots, one after the other, beside a VM whose memory they must not see.

Each is restored on a host that another VM shares, run, inspected, saved, run again and closed.  It
is either refused at once, by SnapshotError, or it is a VM: what its runs come to is a Stop.

Source: none.  Invariants checked: no other exception, ever; the neighbor's memory stays as it was;
afterwards the host has its frames back, each free once, and no processor more.
"""

import functools
import random
import time
from collections.abc import Callable
from contextlib import suppress

from tests.walls.mutations import Pieces, State, mutated
from understudy.guests import hello, loader
from understudy.image_file import SnapshotError, pack, unpack
from understudy.linux import VM as LinuxVM
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.vm import VM

SECRET = b"the neighbor's secret"
HOST = 192 << 20
LONG_S = 20.0  # nothing of it takes so long but a hang
INSTRUCTIONS = 20_000


def of_hello(paging: str) -> bytes:
    """A VM that has printed half of what it prints."""
    with VM("2M", paging=paging) as vm:
        vm.enter(loader.load(vm.memory, hello.image()))
        vm.go(budget=100)
        return vm.save()


@functools.cache
def booted() -> bytes:
    """A Linux at its prompt."""
    with LinuxVM.linux("cloud-amd64", memory="96M") as vm:
        vm.wait_for_prompt()
        return vm.save()


def of_linux(paging: str) -> bytes:
    """A Linux that has run a command under this technique."""
    with LinuxVM.restore(booted()) as vm:
        vm.change_paging(paging)
        vm.run("cat /proc/interrupts").check()
        return vm.save()


GUESTS: dict[str, Callable[[str], bytes]] = {"hello": of_hello, "linux": of_linux}


class Campaign:
    """Many mutations of one snapshot."""

    def __init__(self, data: bytes) -> None:
        state, pieces = unpack(memoryview(data))
        self.state: State = state
        self.pieces: Pieces = [(gpa, bytes(piece)) for gpa, piece in pieces]
        self.host = Host(HOST)
        self.neighbor = VM("2M", host=self.host)
        self.neighbor.memory.write(0x15_0000, SECRET)
        self.seen = self.neighbor.memory.read(0, self.neighbor.memory.size)
        self.free = self.host.frames.free_count
        self.processors = list(self.host.processors)
        self.restored = self.refused = 0

    def close(self) -> None:
        """Give the host back."""
        self.host.close()

    def run(self, chance: random.Random) -> None:
        """One mutation; AssertionError says what went wrong, and of what."""
        state, pieces, words = mutated(self.state, self.pieces, chance)
        begun = time.monotonic()
        try:
            self._try(b"".join(pack(state, pieces)))
        except Exception as problem:
            raise AssertionError(f"{words}: {problem!r}") from problem
        left = self.host.frames.free_count, self.host.processors
        assert left == (self.free, self.processors), f"{words}: {left}"
        memory = self.neighbor.memory
        assert memory.read(0, memory.size) == self.seen, f"{words}: foreign writes"
        assert time.monotonic() - begun < LONG_S, f"{words}: takes too long"

    def _try(self, data: bytes) -> None:
        try:
            vm = VM.restore(data, host=self.host)
        except (SnapshotError, OutOfFrames):
            self.refused += 1
            return
        self.restored += 1
        heard = bytearray()
        vm.console.on_output.append(heard.extend)
        with vm:
            vm.go(budget=INSTRUCTIONS, wall_seconds=1)
            vm.inspect()
            vm.describe()
            str(vm.inspect(vm.vcpus[0].registers()["rip"]))
            with suppress(OutOfFrames), VM.restore(vm.save(), host=self.host) as again:
                again.go(budget=INSTRUCTIONS, wall_seconds=1)
            self.owned_once(vm)
            vm.go(budget=INSTRUCTIONS, wall_seconds=1)
        assert SECRET not in heard, "foreign bytes"

    def owned_once(self, vm: VM) -> None:
        """No frame belongs to the neighbor and to this VM, nor twice to it."""
        frames = [
            pfn
            for one in (self.neighbor, vm)
            for extent in one.memory.p2m
            for pfn in range(extent.pfn, extent.pfn + extent.frames)
        ]
        assert len(frames) == len(set(frames)), "a frame has two owners"
