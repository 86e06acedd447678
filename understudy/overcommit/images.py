"""Images of VMs on a host that has less memory than its VMs: nobody needs their frames for a while.

Idea: what a guest writes after a snapshot it copies first, so an image comes to have frames of its
own.  They are the first that are swapped out.

Source: ours.
Cost: an image that has no such frame is gone through as a whole; so it is left alone then, until
there were some more copies.
Invariants: an image that is closed, or forgotten, at any moment and in any thread, ends when nobody
is just swapping frames of images; then its frames are free at once.
"""

import threading
from collections.abc import Callable
from typing import Final

from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.overcommit.plan import Need

FEW: Final = 512  # copies that guests get


class Images:
    """Those that are kept on one host."""

    def __init__(self, host: Host) -> None:
        self._host, self._spent = host, dict[P2m, int]()  # at how many copies
        self._copies = CopyOnWrite(host)
        self._needs: dict[P2m, Need] = {}
        self._gone: list[P2m] = []
        self._in_use = threading.Lock()

    def add(self, image: P2m, need: Need) -> None:
        """One more."""
        self._needs[image] = need

    def needs(self) -> list[Need]:
        """What each may come to need."""
        return list(self._needs.values())

    def all(self) -> list[P2m]:
        """Those that there are now."""
        return list(self._needs)

    def let_go(self, image: P2m) -> None:
        """This one gives its frames back."""
        self._gone.append(image)
        self._end_those_gone()

    def refresh(self) -> None:
        """Time has passed: each may have frames of its own again."""
        self._spent.clear()

    def give(self, enough: int, swap_out: Callable[[P2m, int], int]) -> None:
        """Have frames swapped out that nobody else has, until so many are free, or none is left.

        swap_out: has so many of an image go, and returns how many went.  None of them ends
        meanwhile; and nothing happens inside of another `give`.
        """
        if not self._needs or not self._in_use.acquire(blocking=False):
            return
        try:
            for image in self.all():
                if (short := enough - self._host.frames.free_count) <= 0:
                    break
                if self._host.copied - self._spent.get(image, -FEW) < FEW:
                    continue
                if swap_out(image, short) < short:
                    self._spent[image] = self._host.copied
        finally:
            self._in_use.release()
            self._end_those_gone()

    def _end_those_gone(self) -> None:
        while self._gone and self._in_use.acquire(blocking=False):
            try:
                image = self._gone.pop()
                del self._needs[image]
                self._spent.pop(image, None)
                self._copies.release(image)
            finally:
                self._in_use.release()
