"""The host's own swap file: frames of guests are written out, and read in when they are missed.

Idea: guests are not asked and notice nothing but time.  A victim is chosen by a policy that has a
name; what is in it goes into a slot of the file, and its frame back to the host.  Who misses it (a
guest, a device, the hypervisor) gets a frame and the contents at once.  A frame that is all zero
takes no slot.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Reclamation Mechanisms" and
"Page Replacement" (random victims, so that a host's choice and its guest's cannot conspire).
Cost: one write; one exit, one read.
Invariants: what is pinned, or has another owner, or is a table that a technique traces, stays; a
frame is given up only when its contents are in the file, and a slot only when they are in a frame;
a file that is full or cannot be read changes nothing, and says so.
"""

import os
import random
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final, Self

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import PRESENT, PROTECTED, Flag
from understudy.overcommit.sharing import Sharing

ZEROS: Final = bytes(PAGE)
NO_SLOT: Final = -1  # the contents are zero
LOOKED: Final = PROTECTED & ~Flag.LOGGED
"""Why a frame stays: somebody else has it, or wants to hear of the next write to it."""


class SwapError(OutOfFrames):
    """The swap file has no room, or cannot be written or read."""


class Victims(ABC):
    """A policy: which of a guest's frames goes next.  `class Random(Victims, name="random")`."""

    ALL: ClassVar[dict[str, type["Victims"]]] = {}

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()
        Victims.ALL[name] = cls

    @abstractmethod
    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        """These frames (gfn, rising), the one that is to go first at the beginning."""

    def came(self, p2m: P2m, gfn: int) -> None:  # noqa: B027
        """A frame was read in."""


class Random(Victims, name="random"):
    """Any of them, by a generator that begins at the same number in each run."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        return self._random.sample(frames, len(frames))


class Oldest(Victims, name="oldest"):
    """Who was read in longest ago; before all others who never was."""

    def __init__(self) -> None:
        self._came: dict[P2m, dict[int, int]] = {}
        self._count = 0

    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        came = self._came.get(p2m, {})
        return sorted(frames, key=lambda gfn: (came.get(gfn, 0), gfn))

    def came(self, p2m: P2m, gfn: int) -> None:
        self._count += 1
        self._came.setdefault(p2m, {})[gfn] = self._count


class Swap:
    """Owns `Flag.SWAPPED` in any number of p2ms of one host."""

    def __init__(
        self, host: Host, size: int, policy: str = "random", folder: Path | None = None,
        sharing: Sharing | None = None,
    ) -> None:  # fmt: skip
        """size: bytes that the file may have.  folder: where it is; it has no name there.

        sharing: where a frame is looked up before it is written out.

        ValueError if the policy is none; OSError if there can be no file.
        """
        if policy not in Victims.ALL:
            raise ValueError(f"swap policy {policy!r}: expected one of {', '.join(Victims.ALL)}")
        self.written = self.read = 0  # frames, ever
        self._memory, self._frames, self._sharing = host.memory, host.frames, sharing
        self._contents = host.contents
        self._victims = Victims.ALL[policy]()
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (`close`)
        self._free = list(range(size // PAGE - 1, -1, -1))  # slots, the last is used first
        self._slots: dict[P2m, dict[int, int]] = {}  # gfn -> slot
        self._pinned: dict[P2m, dict[int, int]] = {}  # gfn -> how often

    # --- who takes part ---

    def join(self, p2m: P2m) -> None:
        """Frames of a guest may be swapped out from now on."""
        if Flag.SWAPPED in p2m.owners:
            raise ValueError("somebody else swaps this memory: expected no owner of SWAPPED yet")
        p2m.owners[Flag.SWAPPED] = self
        self._slots[p2m], self._pinned[p2m] = {}, {}

    def leave(self, p2m: P2m) -> None:
        """A guest is no more, or what it had here is to be in frames again.

        SwapError, or OutOfFrames, if that cannot be: it takes part as before.
        """
        for gfn in list(self._slots[p2m]):
            if p2m.word(gfn) & Flag.SWAPPED:
                self.touch(p2m, gfn)
            else:  # its memory was cleared or given back
                self._forget(p2m, gfn)
        del self._slots[p2m], self._pinned[p2m], p2m.owners[Flag.SWAPPED]

    def pin(self, p2m: P2m, gfn: int) -> int:
        """A device is going to use this frame by its pfn, which is returned, until `unpin`."""
        if not p2m.touch(gfn, write=True) or (pfn := p2m.lookup(gfn)) is None:
            raise ValueError(f"guest frame {gfn:#x}: expected RAM that may be written")
        pins = self._pinned[p2m]
        pins[gfn] = pins.get(gfn, 0) + 1
        self._frames.share(pfn, 1)  # the device is an owner: nobody moves the frame, or frees it
        return pfn

    def unpin(self, p2m: P2m, gfn: int, pfn: int) -> None:
        """The device has done with what `pin` returned."""
        self._frames.free(pfn, 1)
        pins = self._pinned[p2m]
        pins[gfn] -= 1
        if not pins[gfn]:
            del pins[gfn]

    @property
    def swapped(self) -> int:
        """Frames that are out now."""
        return sum(
            bool(p2m.word(gfn) & Flag.SWAPPED)
            for p2m, slots in self._slots.items() for gfn in slots
        )  # fmt: skip

    # --- out, and in ---

    def reclaim(self, p2m: P2m, count: int) -> int:
        """Swap so many frames of a guest out, or as many as may go; returns how many went.

        Those that another frame is like are shared instead, and counted here as well.

        SwapError if the file takes no more: what went before that is out.
        """
        for gfn in [gfn for gfn in self._slots[p2m] if not p2m.word(gfn) & Flag.SWAPPED]:
            self._forget(p2m, gfn)  # its memory was cleared, by a reset
        may_go = [
            gfn for start, word, frames in p2m.pieces()
            if word & PRESENT and not word & LOOKED
            for gfn in range(start, start + frames) if self._may_go(p2m, gfn)
        ]  # fmt: skip
        gone = self._victims.order(p2m, may_go)[:count]
        went = 0
        for gfn in gone:
            if not self._may_go(p2m, gfn):  # one that went before has come to share it
                continue
            if self._sharing is None or not self._sharing.look_up(p2m, gfn):
                self._write_out(p2m, gfn)
            went += 1
        return went

    def _may_go(self, p2m: P2m, gfn: int) -> bool:
        if gfn in self._pinned[p2m] or any(gfn in tracer.traced for tracer in p2m.tracers):
            return False
        pfn = p2m.lookup(gfn)
        return pfn is not None and self._frames.references(pfn) == 1

    def _write_out(self, p2m: P2m, gfn: int) -> None:
        p2m.halt()  # nobody writes to it from here on
        word = p2m.word(gfn)
        contents = self._contents(word >> PAGE_SHIFT)
        slot = NO_SLOT
        if contents != ZEROS:
            if not self._free:
                raise SwapError(
                    f"the swap file is full: guest frame {gfn:#x} stays in memory; give it more "
                    "bytes, Swap(host, size)"
                )
            slot = self._free[-1]
            try:
                self._put(slot, contents)
            except OSError as problem:
                raise SwapError(
                    f"the swap file cannot be written ({problem.strerror}): guest frame {gfn:#x} "
                    "stays in memory"
                ) from problem
            self._free.pop()
        self._slots[p2m][gfn] = slot
        p2m.take(gfn, 1, Flag.SWAPPED)
        self._frames.free(word >> PAGE_SHIFT, 1)
        self.written += 1

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Somebody misses a frame: read it in.  OutOfFrames or SwapError: it is out as before."""
        slot, pfn = self._slots[p2m][gfn], self._frames.allocate()
        try:
            if slot != NO_SLOT:
                self._memory.write(pfn << PAGE_SHIFT, self._get(slot, gfn))
        except SwapError:
            self._frames.free(pfn, 1)
            raise
        self._forget(p2m, gfn)
        p2m.map(gfn, pfn, 1)
        self._victims.came(p2m, gfn)
        self.read += 1

    def write(self, p2m: P2m, gfn: int) -> None:
        """It protects nothing."""
        raise ValueError(f"guest frame {gfn:#x} is protected, but not to be swapped")

    def _forget(self, p2m: P2m, gfn: int) -> None:
        slot = self._slots[p2m].pop(gfn)
        if slot != NO_SLOT:
            self._free.append(slot)

    def _put(self, slot: int, contents: bytes) -> None:
        done = 0
        while done < PAGE:
            done += os.pwrite(self._file.fileno(), contents[done:], slot * PAGE + done)

    def _get(self, slot: int, gfn: int) -> bytes:
        try:
            contents = os.pread(self._file.fileno(), PAGE, slot * PAGE)
        except OSError as problem:
            raise SwapError(
                f"the swap file cannot be read ({problem.strerror}): guest frame {gfn:#x} is in it"
            ) from problem
        if len(contents) != PAGE:
            raise SwapError(f"the swap file was cut: guest frame {gfn:#x} is in it")
        return contents

    def close(self) -> None:
        """The file is no more; whoever still had something in it has lost it: let them leave."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
