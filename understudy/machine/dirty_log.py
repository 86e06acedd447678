"""A dirty log: which guest frames have been written since it was last asked.

Idea: all frames are protected; the first write to one unprotects it, and so writes it down.  What
has been written is what is not protected: a frame that was mapped anew counts, too.  Whoever writes
is seen: the guest under each paging technique, devices, the hypervisor for the guest.

Source: KVM's documentation, "KVM_GET_DIRTY_LOG".  Cost: one exit for each frame and round.
Invariant: a frame without the flag has been written, or mapped, since the last `take`.
"""

from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import Flag

LOGGED = Flag.LOGGED


class DirtyLog:
    """Owns `Flag.LOGGED` in one p2m, from `start` to `stop`."""

    def __init__(self, p2m: P2m) -> None:
        self._p2m = p2m

    def start(self) -> None:
        """Write down from now on."""
        if LOGGED in self._p2m.owners:
            raise ValueError("there is a dirty log of this memory already: stop it first")
        self._p2m.owners[LOGGED] = self
        self._p2m.protect_all(LOGGED)

    def take(self) -> list[int]:
        """The frames (gfn) that were written since `start`, or since this was last called."""
        if self._p2m.owners.get(LOGGED) is not self:
            raise ValueError("the dirty log does not run: start it first")
        runs = [piece for piece in self._p2m.pieces() if not piece[1] & LOGGED]
        with self._p2m.batch():
            for gfn, _, frames in runs:
                self._p2m.protect(gfn, frames, LOGGED)
        return [frame for gfn, _, frames in runs for frame in range(gfn, gfn + frames)]

    def stop(self) -> None:
        """Write nothing down any more."""
        if self._p2m.owners.get(LOGGED) is self:
            self._p2m.unprotect_all(LOGGED)
            del self._p2m.owners[LOGGED]

    def write(self, p2m: P2m, gfn: int) -> None:
        """A frame is going to be written."""
        p2m.unprotect(gfn, 1, LOGGED)

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever taken away."""
        raise GuestMemoryError(f"guest frame {gfn:#x} was taken away, but not by the dirty log")
