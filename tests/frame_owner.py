"""An owner of frames that passes each question on: what a test does when somebody wants one."""

from collections.abc import Callable
from dataclasses import dataclass

from understudy.machine.p2m import P2m
from understudy.machine.words import Flag


@dataclass
class FrameOwner:
    """Takes part as the owner of frames that are swapped out, and of frames that are sealed."""

    on_write: Callable[[int], None]
    on_touch: Callable[[int], None]

    def own(self, p2m: P2m) -> None:
        """Be asked from now on."""
        p2m.owners = {Flag.SWAPPED: self, Flag.SEALED: self}

    def write(self, p2m: P2m, gfn: int) -> None:
        """Somebody wants to write a sealed frame."""
        self.on_write(gfn)

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Somebody needs a frame that is not there."""
        self.on_touch(gfn)
