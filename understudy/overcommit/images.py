"""Images of VMs on a host that has less memory than its VMs: nobody needs their frames for a while.

Idea: what a guest writes after a snapshot it copies first, so an image comes to have frames of its
own.  They are the first that are swapped out.

Source: ours.
Cost: an image that has no such frame is gone through as a whole; so it is left alone then, until
some more frames have been given up, by whomever.
"""

from collections.abc import Callable
from typing import Final

from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.overcommit.plan import Need

FEW: Final = 512  # frames that somebody has given up


class Images:
    """Those that are kept on one host."""

    def __init__(self, host: Host) -> None:
        self._frames = host.frames
        self._needs: dict[P2m, Need] = {}
        self._spent: dict[P2m, int] = {}  # how many frames had been given up then

    def add(self, image: P2m, need: Need) -> None:
        """One more."""
        self._needs[image] = need

    def drop(self, image: P2m) -> None:
        """This one is no more."""
        del self._needs[image]
        self._spent.pop(image, None)

    def needs(self) -> list[Need]:
        """What each may come to need."""
        return list(self._needs.values())

    def all(self) -> list[P2m]:
        """Those that there are now."""
        return list(self._needs)

    def refresh(self) -> None:
        """Time has passed: each may have frames of its own again."""
        self._spent.clear()

    def give(self, enough: int, swap_out: Callable[[P2m, int], int]) -> None:
        """Have frames swapped out that nobody else has, until so many are free, or none is left.

        swap_out: has so many of an image go, and returns how many went.
        """
        for image in self._needs:
            if (short := enough - self._frames.free_count) <= 0:
                break
            if self._frames.given_up - self._spent.get(image, -FEW) < FEW:
                continue
            if swap_out(image, short) < short:
                self._spent[image] = self._frames.given_up
