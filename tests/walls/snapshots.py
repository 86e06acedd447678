"""Mutated snapshots, one after the other, beside a VM whose memory they must not see.

    python tests/walls/snapshots.py --seed 1 --count 1000 --guest linux

Each is restored on a host that another VM shares, run, inspected, saved, run again and closed.  It
is either refused at once, by SnapshotError, or it is a VM: what its runs come to is a Stop.

Source: none.  Invariants checked: no other exception, ever; the neighbor's memory stays as it was;
afterwards the host has its frames back, each free once, and no processor more.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.walls.mutations import Pieces, State, mutated
from understudy.guests import hello, loader
from understudy.image_file import SnapshotError, pack, unpack
from understudy.linux import VM as LinuxVM
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.paging import Paging
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


def of_linux(paging: str) -> bytes:
    """A Linux at its prompt, with a command run."""
    with LinuxVM.linux("cloud-amd64", memory="96M", paging=paging) as vm:
        vm.run("cat /proc/interrupts")
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

    def run(self, seed: int) -> None:
        """One mutation; AssertionError says what went wrong, and of what."""
        state, pieces, words = mutated(self.state, self.pieces, random.Random(seed))
        begun = time.monotonic()
        try:
            self._try(b"".join(pack(state, pieces)))
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {words}: {problem!r}") from problem
        left = self.host.frames.free_count, self.host.processors
        assert left == (self.free, self.processors), f"seed {seed}: {words}: {left}"
        memory = self.neighbor.memory
        assert memory.read(0, memory.size) == self.seen, f"seed {seed}: {words}: foreign writes"
        assert time.monotonic() - begun < LONG_S, f"seed {seed}: {words}: takes too long"

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


def seeds(seed: int, count: int) -> Iterator[int]:
    """The seeds of a campaign."""
    return iter(range(seed, seed + count))


def main() -> None:
    """Run a campaign, and say how it went."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--guest", action="append", choices=GUESTS)
    parser.add_argument("--paging", action="append", choices=sorted(Paging.ALL))
    parser.add_argument("--go-on", action="store_true", help="after a failure")
    chosen: Any = parser.parse_args()
    failures = 0
    for guest in chosen.guest or GUESTS:
        for paging in chosen.paging or sorted(Paging.ALL):
            campaign = Campaign(GUESTS[guest](paging))
            for seed in seeds(chosen.seed, chosen.count):
                try:
                    campaign.run(seed)
                except AssertionError as problem:
                    failures += 1
                    print(problem, flush=True)
                    if not chosen.go_on:
                        raise
                    made = campaign
                    campaign = Campaign(b"".join(pack(made.state, made.pieces)))
            how = f"{campaign.restored} restored, {campaign.refused} refused"
            print(
                f"{guest} under {paging}: {chosen.count} from {chosen.seed} on: {how}", flush=True
            )
            campaign.close()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
