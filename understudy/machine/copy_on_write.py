"""Copy-on-write: several VMs read one host frame, and whoever writes gets a copy of its own.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory"; the
lecture's slides on sharing.  How many share a frame is its reference count (see `frames`).

Invariants: a frame with more than one owner is protected in every p2m that names it; each p2m that
names it holds one reference; frames that were never written stay holes, which cost nothing.
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import Flag

ZEROS: Final = bytes(PAGE)


class CopyOnWrite:
    """Owns `Flag.SHARED` in any number of p2ms of one host; it keeps nothing of its own."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._memory, self._frames, self._contents = host.memory, host.frames, host.contents
        self._frame_for = host.frame_for

    def clone(self, source: P2m, target: P2m) -> None:
        """Put the host frames of one p2m behind another, which is empty; both share them now.

        Frames that were taken away are brought back first if nobody but their owner knows where
        their contents are; but those that are swapped out, or that the guest does without, are
        gone from the target, too.  Whatever else protects the source's frames does not the
        target's.  OutOfFrames, and the target is empty, if there is none for a copy of what a
        device uses.
        """
        source.bring_back()
        self._frames.share_all([(pfn, frames) for _, pfn, frames in source])
        source.owners[Flag.SHARED] = target.owners[Flag.SHARED] = self
        source.protect_all(Flag.SHARED)
        target.copy(source, Flag.SHARED)
        if source.keeper is not None:
            try:
                source.keeper.follow(source, target)
            except BaseException:
                self.release(target)
                raise

    def release(self, p2m: P2m) -> None:
        """Give up all frames of a p2m, which is empty then."""
        if p2m.keeper is not None:
            p2m.keeper.drop(p2m)
        self._frames.free_all([(pfn, frames) for _, pfn, frames in p2m.clear()])

    def write(self, p2m: P2m, gfn: int) -> None:
        """A frame is going to be written: the last owner keeps it, any other gets a copy."""
        pfn = p2m.lookup(gfn)
        if pfn is None:
            raise GuestMemoryError(f"guest frame {gfn:#x} is shared, and there is no host frame")
        if self._frames.references(pfn) == 1:
            p2m.unprotect(gfn, 1, Flag.SHARED)
            return
        copy = self._frame_for(p2m)
        contents = self._contents(pfn)
        if contents != ZEROS:
            self._memory.write(copy << PAGE_SHIFT, contents)
        p2m.move(gfn, copy, off=Flag.SHARED)
        self._frames.free(pfn, 1)
        self._host.copied += 1

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever taken away."""
        raise GuestMemoryError(f"guest frame {gfn:#x} was taken away, but not to be shared")
