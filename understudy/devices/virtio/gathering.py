"""Requests that wait a little, so that those which follow are carried out with them.

A driver that has many requests under way hands them over one by one.  Carried out within its kick,
each costs the exit of the kick, an interrupt, and the interrupt's end.  Left in the ring for a
moment, with the driver not asked for more kicks, those that come meanwhile cost none of these, and
one interrupt tells of all of them.  (QEMU's disks gather them without intent: another thread serves
the ring, and is late.)

A driver that has one request under way would wait for nothing.  Which of the two it is, the ring
does not say, so it is tried: after `ALONE` kicks that were answered at once, one waits.  If others
have joined it by the end, the next ones wait, too.  The wait ends when a processor halts, because
whoever wanted the requests has nothing else to do then (`Clock.hurry`), and after `GATHER_NS` of
guest time at the latest.

Source: ours; Virtual I/O Device (VIRTIO) Version 1.2, "Used Buffer Notification Suppression" and
"Available Buffer Notification Suppression"; docs/decisions/0096-*.

Invariants: what waits is in the ring and was not looked at; a wait ends at a time, or at a HLT, so
that two runs in virtual time gather the same; a snapshot keeps who waits, and until when.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from understudy.clock import Alarm
from understudy.devices.virtio.pci import VirtioPci, VirtioState
from understudy.devices.virtio.queue import Queue, RingError
from understudy.devices.wires import Wires
from understudy.machine.frames import OutOfFrames
from understudy.state import U64

ALONE: Final = 32  # kicks that are answered at once before one waits again to see
GATHER_NS: Final = 500_000  # that one waits at the longest
COMPANY: Final = 2  # requests with which a wait was worth it


@dataclass
class GatheringState(VirtioState):
    """Of a device that gathers."""

    gathering: U64 = 0  # queues, as bits, whose requests wait for others


class Gathering(VirtioPci):
    """A virtio device whose drivers may have many requests under way."""

    state: GatheringState

    def __init__(self, wires: Wires, kind: int, class_code: int, sizes: Sequence[int]) -> None:
        super().__init__(wires, kind, class_code, sizes)
        self.together = self.alarms["together"] = Alarm(
            self.clock, self._serve_gathered, hurries=True
        )

    def notified(self, number: int) -> None:
        s = self.state
        queue = s.queues[number]
        if queue.alone < ALONE or not self.is_live or not queue.is_enabled:
            if queue.alone < ALONE:
                queue.alone += 1
            self.kick(number)
            return
        if s.gathering >> number & 1:
            return
        try:
            ring = self.queue(number)
            ring.check()
            ring.let_kick(False)
        except (RingError, IndexError):
            self.needs_reset()
        except OutOfFrames:  # it may be said no more than be done
            self.kick(number)
        else:
            if self.together.when is None:
                self.together.set(self.clock.now() + GATHER_NS)
            s.gathering |= 1 << number

    def _serve_gathered(self) -> None:
        self.moved = 0
        for number, queue in enumerate(self.state.queues):
            if self.state.gathering >> number & 1:
                self.kick(number)
                if self.served < COMPANY:
                    queue.alone = 0

    def _drain(self, number: int, queue: Queue) -> int | None:
        s = self.state
        if s.gathering >> number & 1 and self.together.when is None:  # the wait is over
            queue.let_kick(True)
            s.gathering &= ~(1 << number)
        return super()._drain(number, queue)
