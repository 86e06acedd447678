"""The host's own swap file: frames of guests are written out, and read in when they are missed.

Idea: guests are not asked and notice nothing but time.  A victim is chosen by a policy that has a
name; what is in it goes into a slot of the file, and its frame back to the host.  Who misses it (a
guest, a device, the hypervisor) gets a frame and the contents at once.  A frame that is all zero
takes no slot.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Reclamation Mechanisms" and
"Page Replacement" (random victims, so that a host's choice and its guest's cannot conspire).
Cost: one write; one exit, one read; in real time an exit more each time that a guest looks in vain
for what the computer itself has to read from its disk.
Invariants: what is pinned, or is a table that a technique traces, stays; a frame with several
owners goes for all of them or stays; a frame is given up only when its contents are in the file,
and a slot only when they are in a frame; a file that is full or cannot be read changes nothing, and
says so.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Self

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frames import Frames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs, Watcher
from understudy.machine.words import PRESENT, PROTECTED, Flag
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.swap_file import SwapError, SwapFile
from understudy.overcommit.victims import Wish, victims_of

ZEROS: Final = bytes(PAGE)
NO_SLOT: Final = -1  # the contents are zero
FEW: Final = 64  # frames with several owners that are looked up at once
FIRST_NS: Final = 100_000  # of real time, before who misses a frame looks for it again
DOUBLED: Final = 6  # times that this is, so that a disk that is slow is not asked all the time
LOOKS: Final = 100  # before it waits for the disk, with all others
Places = list[tuple[P2m, int]]
"""Who has a frame, and where (gfn)."""
LOOKED: Final = PROTECTED & ~(Flag.LOGGED | Flag.SHARED)
"""Why a frame stays: somebody wants to hear of the next write to it.

One that was shared, and has no other owner any more, may go.
"""


class Swap:
    """Owns `Flag.SWAPPED` in any number of p2ms of one host."""

    def __init__(
        self, host: Host, size: int, policy: Wish = "random", folder: Path | None = None,
        sharing: Sharing | None = None,
    ) -> None:  # fmt: skip
        """size: bytes that the file may have.  folder: where it is; it has no name there.

        sharing: where a frame is looked up before it is written out.

        ValueError if the policy is none; OSError if there can be no file.
        """
        self.written = self.read = 0  # frames, ever
        self.looked_up = self.alike = 0
        """Victims that were looked up before they were written, and those that were shared."""
        self._memory, self._frames, self._sharing = host.memory, host.frames, sharing
        self._contents, self._frame_for = host.contents, host.frame_for
        self._victims = victims_of(policy)
        self.file = SwapFile(size // PAGE, folder)
        self._more: Counter[int] = Counter()  # slot -> how many have it beside the first one
        self._slots: dict[P2m, dict[int, int]] = {}  # gfn -> slot
        self._pinned: dict[P2m, dict[int, int]] = {}  # gfn -> how often
        self._watchers: dict[P2m, Watcher] = {}
        self.read_by: Counter[P2m] = Counter()
        """Frames that each guest has missed, and got back, ever."""
        self.on_read: Callable[[P2m], object] = lambda p2m: None
        """Hears of each that came out of the file."""
        self.put_off: Callable[[P2m, int], bool] | None = None
        """In real time: has the vCPU that misses a frame executed no more for so many ns, if one
        does."""
        self.waits = 0  # times that a guest was put off, ever
        self._looks: dict[int, int] = {}  # slot -> how often it was looked for what is coming

    # --- who takes part ---

    def join(self, p2m: P2m) -> None:
        """Frames of a guest may be swapped out from now on."""
        if Flag.SWAPPED in p2m.owners:
            raise ValueError("somebody else swaps this memory: expected no owner of SWAPPED yet")
        p2m.owners[Flag.SWAPPED] = p2m.keeper = self
        self._slots[p2m], self._pinned[p2m] = {}, {}
        self._watchers[p2m] = watcher = partial(self._changed, p2m)
        p2m.watchers.append(watcher)

    def leave(self, p2m: P2m) -> None:
        """A guest is no more, or what it had here is to be in frames again.

        SwapError, or OutOfFrames, if that cannot be: it takes part as before.
        """
        for gfn in list(self._slots[p2m]):
            self.touch(p2m, gfn)
        self.drop(p2m)

    def drop(self, p2m: P2m) -> None:
        """A guest is no more, and nobody wants what it had here."""
        p2m.watchers.remove(self._watchers.pop(p2m))
        for gfn in list(self._slots[p2m]):
            self._forget(p2m, gfn)
        del self._slots[p2m], self._pinned[p2m], self.read_by[p2m], p2m.owners[Flag.SWAPPED]
        p2m.keeper = None
        self._victims.leave(p2m)

    def follow(self, source: P2m, target: P2m) -> None:
        """What is out of one guest is out of its copy: they have the slot in common.

        The copy gets frames of its own where a device may write to the other one's.  OutOfFrames
        if there are none: it is to be released then.
        """
        if target not in self._slots:
            self.join(target)
        for gfn, slot in self._slots[source].items():
            self._slots[target][gfn] = slot
            if slot != NO_SLOT:
                self._more[slot] += 1
        for gfn in self._pinned[source]:  # the device goes on with the frame that it knows
            source.unprotect(gfn, 1, Flag.SHARED)
        for gfn in self._pinned[source]:
            pfn = source.lookup(gfn)
            assert pfn is not None
            copy = self._frame_for(target)
            self._memory.write(copy << PAGE_SHIFT, self._contents(pfn))
            target.move(gfn, copy, off=Flag.SHARED)
            self._frames.free(pfn, 1)

    def pieces(self, p2m: P2m) -> Iterator[tuple[int, bytes]]:
        """As `Keeper.pieces` says.  SwapError if the file cannot be read."""
        for gfn, slot in sorted(self._slots[p2m].items()):
            if slot != NO_SLOT:
                yield gfn, self.file.get(slot, gfn)

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
        return sum(map(len, self._slots.values()))

    def swapped_of(self, p2m: P2m) -> int:
        """Frames of this guest that are out now."""
        return len(self._slots[p2m])

    @property
    def in_file(self) -> int:
        """Slots in use: what is out and is not all zero."""
        return self.file.used

    # --- out, and in ---

    def reclaim(self, p2m: P2m, count: int, *, looks_up: bool = True) -> int:
        """Swap so many frames of a guest out, or as many as may go; returns how many went.

        Those that another frame is like are shared instead, and counted here as well, unless
        nobody's rights may change (`looks_up`).

        SwapError if the file takes no more: what went before that is out.
        """
        went = 0
        for gfn in self._victims.choose(p2m, count, partial(self._may_go, p2m)):
            if not self._may_go(p2m, gfn):  # one that went before has come to share it
                continue
            if not (looks_up and self._is_shared(p2m, gfn)):
                self._write_out([(p2m, gfn)])
            went += 1
        return went

    def reclaim_common(self, spare: dict[P2m, int], count: int) -> int:
        """Swap out so many frames that several have, or as many as may go, for all who have them.

        spare: how many guest frames each may lose; nobody else loses one.  Goes through all memory
        of these: for when nothing else is left.  SwapError as for `reclaim`.
        """
        went = 0
        for places in _in_common(self._frames, spare, max(count, FEW)):
            if went == count:
                break
            lost = Counter(p2m for p2m, _ in places)
            if all(spare[p2m] >= n for p2m, n in lost.items()) and all(
                self._is_loose(p2m, gfn) for p2m, gfn in places
            ):
                self._write_out(places)
                for p2m, n in lost.items():
                    spare[p2m] -= n
                went += 1
        return went

    def _is_shared(self, p2m: P2m, gfn: int) -> bool:
        if self._sharing is None:
            return False
        self.looked_up += 1
        found = self._sharing.look_up(p2m, gfn)
        self.alike += found
        return found

    def _may_go(self, p2m: P2m, gfn: int) -> bool:
        if not self._is_loose(p2m, gfn):
            return False
        return self._frames.references(p2m.word(gfn) >> PAGE_SHIFT) == 1

    def _is_loose(self, p2m: P2m, gfn: int) -> bool:
        """Whether nothing but another owner may keep a frame here."""
        word = p2m.word(gfn)
        if not word & PRESENT or word & LOOKED or gfn in self._pinned[p2m]:
            return False
        return not any(gfn in tracer.traced for tracer in p2m.tracers)

    def _write_out(self, places: Places) -> None:
        """A frame, of all who have it: they have the slot in common."""
        for p2m, _ in places:
            p2m.halt()  # nobody writes to it from here on
        p2m, gfn = places[0]
        pfn = p2m.word(gfn) >> PAGE_SHIFT
        contents = self._contents(pfn)
        slot = NO_SLOT
        if contents != ZEROS:
            slot = self.file.put(contents, gfn)
            if len(places) > 1:
                self._more[slot] = len(places) - 1
        for p2m, gfn in places:
            self._slots[p2m][gfn] = slot
            p2m.take(gfn, 1, Flag.SWAPPED)
            self._frames.free(pfn, 1)
        self.written += 1

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Somebody misses a frame: read it in.  OutOfFrames or SwapError: it is out as before."""
        slot, pfn = self._slots[p2m][gfn], self._frame_for(p2m)
        if slot != NO_SLOT:
            try:
                self._memory.write(pfn << PAGE_SHIFT, self.file.get(slot, gfn))
            except SwapError:
                self._frames.free(pfn, 1)
                raise
            self.on_read(p2m)
        self._forget(p2m, gfn)
        p2m.map(gfn, pfn, 1)
        self._victims.came(p2m, gfn)
        self.read += 1
        self.read_by[p2m] += 1

    def is_coming(self, p2m: P2m, gfn: int) -> bool:
        """As `Keeper.is_coming` says: in real time, what the computer has to read from its disk.

        That has been begun; when it is over nobody tells.
        """
        if self.put_off is None or (slot := self._slots[p2m].get(gfn, NO_SLOT)) == NO_SLOT:
            return False
        looks = self._looks.pop(slot, 0)
        if looks == LOOKS or self.file.is_at_hand(slot):
            return False
        if not self.put_off(p2m, FIRST_NS << min(looks, DOUBLED)):
            return False
        if not looks:
            self.file.fetch(slot)
        self._looks[slot] = looks + 1
        self.waits += 1
        return True

    def _changed(self, p2m: P2m, runs: Runs) -> None:
        """What was put in place of a frame that is out, or that nobody wants it: forget it."""
        slots = self._slots[p2m]
        for first, count in runs:
            gone = slots.keys() & range(first, first + count) if count > 1 else (first,)
            for gfn in gone:
                if gfn in slots and not p2m.word(gfn) & Flag.SWAPPED:
                    self._forget(p2m, gfn)

    def write(self, p2m: P2m, gfn: int) -> None:
        """It protects nothing."""
        raise ValueError(f"guest frame {gfn:#x} is protected, but not to be swapped")

    def _forget(self, p2m: P2m, gfn: int) -> None:
        slot = self._slots[p2m].pop(gfn)
        if slot == NO_SLOT:
            return
        if slot in self._more:
            self._more[slot] -= 1
            if not self._more[slot]:
                del self._more[slot]
        else:
            self._looks.pop(slot, None)
            self.file.give_back(slot)

    def close(self) -> None:
        """The file is no more; whoever still had something in it has lost it: let them leave."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _in_common(frames: Frames, p2ms: Iterable[P2m], few: int) -> Iterator[Places]:
    """Frames with several owners, all of them among these, those of the fewest owners first.

    Where so `few` of them are is looked up at once.
    """
    p2ms = list(p2ms)
    known = Counter(pfn for p2m in p2ms for _, pfn in _shared(frames, p2m))
    whole = sorted((n, pfn) for pfn, n in known.items() if frames.references(pfn) == n)
    for at in range(0, len(whole), few):
        found: dict[int, Places] = {pfn: [] for _, pfn in whole[at : at + few]}
        for p2m in p2ms:
            for gfn, pfn in _shared(frames, p2m):
                if pfn in found:
                    found[pfn].append((p2m, gfn))
        yield from found.values()


def _shared(frames: Frames, p2m: P2m) -> Iterator[tuple[int, int]]:
    """(gfn, pfn) of those that have another owner."""
    for gfn, word, count in p2m.pieces():
        first = word >> PAGE_SHIFT
        if word & PRESENT and frames.sole(first, count) < count:
            for n in range(count):
                if frames.references(first + n) > 1:
                    yield gfn + n, first + n
