"""The clock of a host: the TSC of the pCPU whose turn it is; in real time they are all the same.

Source: decision 0050.  Invariant: it never goes back.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter

from understudy.silicon import Processor, wall_tsc


class HostTime:
    """Nanoseconds since the host was switched on."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self.read: Callable[[], int] = partial(attrgetter("tsc"), processor)

    def now(self) -> int:
        """In ns."""
        return self.read()

    def follow(self, processor: Processor) -> None:
        """It is this one's turn: its counter stood while others had theirs."""
        if processor is self._processor:
            return
        late = self.read() - processor.tsc
        if late > 0:
            processor.advance(late)
        self._processor = processor
        self.read = partial(attrgetter("tsc"), processor)


class RealTime(HostTime):
    """The computer's."""

    def __init__(self) -> None:
        self.read = wall_tsc

    def follow(self, processor: Processor) -> None:
        """Its counter never stood."""
