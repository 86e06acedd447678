"""Virtio memory balloon device: memory that a guest gives back while it runs.

The host sets a target; the guest's driver allocates pages until as many are in the balloon, names
them here (inflate), and takes them out again (deflate).  Beside that it reports pages that are free
just now, and what it counts of its memory.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Traditional Memory Balloon Device".  Drivers may
use a page before they say that they take it out (VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered):
it is there again, with zeros in it, when it is touched.

Not modeled: free page hinting, the poison value.  A driver that skips the queue of the former finds
the reporting queue at 4, where the specification has it, or at 3, the next number, where Linux
looks for it: without hinting both are that queue.

A driver is hostile.  Invariants: what it says harms only its own memory; one buffer names at most
`MOST` pages, what is beyond that stays the guest's; each page counts as its work, so no ring keeps
the hypervisor; what it says that it has given (`actual`) is only a number, what the host has is
counted by `pages`.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any, Final, Protocol

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.devices.virtio.pci import NotNow, VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, cut, length
from understudy.devices.wires import Wires
from understudy.machine.p2m import joined
from understudy.state import U32, U64

# --- The specification ---

KIND: Final = 5
CLASS: Final = 0xFF0000  # no class that PCI knows
STATS_VQ: Final = 1 << 1  # VIRTIO_BALLOON_F_*
DEFLATE_ON_OOM: Final = 1 << 2
PAGE_REPORTING: Final = 1 << 5
INFLATE, DEFLATE, STATISTICS, REPORTING, ALSO_REPORTING = range(5)  # queues
CONFIG: Final = struct.Struct("<II")  # num_pages, actual
STATISTIC: Final = struct.Struct("<HQ")  # tag, value
TAGS: Final = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory",
    "available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip

# --- Ours ---

QUEUE_SIZE: Final = 128
MOST: Final = 1024  # pages that one buffer names, as many as a page of numbers; Linux names 256
ONE_PAGE: Final = 64 << 10  # its work, in bytes that could be moved: each may lie by itself
MOST_REPORTED: Final = 32 << 10  # pages that one buffer reports; Linux reports 32 times 4 MBytes

Runs = Iterable[tuple[int, int]]
"""(gfn, frames)."""


class Pages(Protocol):
    """The guest's pages, as far as it does without them (`machine.ballooned`)."""

    def inflate(self, runs: Runs) -> int: ...
    def deflate(self, runs: Runs) -> int: ...
    def report(self, runs: Runs) -> int: ...
    def counts(self) -> dict[str, int]: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, saved: dict[str, Any]) -> None: ...


class NoPages:
    """On a board without a VM nobody wants pages."""

    def inflate(self, runs: Runs) -> int:
        """None is given back."""
        return 0

    deflate = report = inflate

    def counts(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def save(self) -> dict[str, Any]:
        """Nothing is to be kept."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Nothing was kept."""


@dataclass
class BalloonState(VirtioState):
    """What the host wants, and what the driver says."""

    target: U32 = 0  # num_pages
    actual: U32 = 0
    is_asked: bool = False  # the buffer of statistics goes back to be filled again
    statistics: dict[int, U64] = field(default_factory=dict)  # by tag
    told_at: U64 = 0  # when it last told them, ns
    inflated: U64 = 0  # pages, as often as the driver has named one
    deflated: U64 = 0
    reported: U64 = 0


class Balloon(VirtioPci, name="virtio_balloon"):
    """The balloon of one VM."""

    battery = ("target", "inflated", "deflated", "reported")
    expected = 0
    state: BalloonState

    def __init__(self, wires: Wires, *, oom: bool = True, reporting: bool = True) -> None:
        """`oom`: the driver takes pages out before the guest kills a process for want of memory.

        `reporting`: it is to report free pages.
        """
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * 5)
        self.offered |= STATS_VQ | DEFLATE_ON_OOM * oom | PAGE_REPORTING * reporting
        self.pages: Pages = NoPages()
        self.state = self.power_on()

    def power_on(self) -> BalloonState:
        return self.fresh(BalloonState)

    # --- the host's side ---

    @property
    def target(self) -> int:
        """Pages that are to be in the balloon."""
        return self.state.target

    @target.setter
    def target(self, pages: int) -> None:
        if not 0 <= pages < 1 << 32:
            raise ValueError(f"a balloon of {pages} pages: expected a number of 32 bits")
        if pages != self.state.target:
            self.state.target = pages
            self.config_changed()

    @property
    def actual(self) -> int:
        """Pages that are in it, if one believes the driver."""
        return self.state.actual

    def ask(self) -> None:
        """Have the driver tell its statistics anew, soon."""
        if self.has(STATS_VQ) and self.is_live:
            self.state.is_asked = True
            self.moved = 0
            self.kick(STATISTICS)

    @property
    def statistics(self) -> dict[str, int]:
        """What the driver told last, by name: bytes of memory, and counts."""
        told = self.state.statistics
        return {name: told[tag] for tag, name in enumerate(TAGS) if tag in told}

    def counts(self) -> dict[str, int]:
        """Pages: as the host wants it, as the driver says, and as the host has them."""
        s = self.state
        return {
            "target": s.target, "actual": s.actual, "inflated": s.inflated,
            "deflated": s.deflated, "reported": s.reported, **self.pages.counts(),
        }  # fmt: skip

    # --- the driver's ---

    def config(self) -> bytes:
        return CONFIG.pack(self.state.target, self.state.actual)

    def write_config(self, offset: int, data: bytes) -> None:
        whole = bytearray(self.config())
        whole[offset : offset + len(data)] = data
        self.state.actual = CONFIG.unpack(whole)[1]

    def serve(self, number: int, chain: Chain) -> int | None:
        s = self.state
        if number == STATISTICS:
            return self._hear(chain)
        if number in (REPORTING, ALSO_REPORTING):
            runs = _reported(chain.writable)
            frames = sum(count for _, count in runs)
            s.reported = _sum(s.reported, frames)
            self.moved += ONE_PAGE * frames
            self.pages.report(runs)
            return 0
        gfns = self._named(chain)
        runs = joined([(gfn, 1) for gfn in gfns])
        self.moved += ONE_PAGE * len(gfns)
        if number == INFLATE:
            s.inflated = _sum(s.inflated, len(gfns))
            self.pages.inflate(runs)
        else:
            s.deflated = _sum(s.deflated, len(gfns))
            self.pages.deflate(runs)
        return 0

    def _named(self, chain: Chain) -> list[int]:
        """The pages of a buffer, which is an array of 32-bit numbers."""
        count = min(length(chain.readable) // 4, MOST)
        data = self.dma.gather(cut(chain.readable, 0, 4 * count))
        return list(struct.unpack(f"<{count}I", data))

    def _hear(self, chain: Chain) -> int | None:
        """A buffer of statistics: it stays until they are wanted again."""
        s = self.state
        if s.is_asked:
            s.is_asked = False
            return 0
        count = min(length(chain.readable), MOST) // STATISTIC.size
        data = self.dma.gather(cut(chain.readable, 0, count * STATISTIC.size))
        s.statistics = {tag: v for tag, v in STATISTIC.iter_unpack(data) if tag < len(TAGS)}
        s.told_at = self.clock.now()
        raise NotNow

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        return super().save() | {"pages": self.pages.save()}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if not isinstance(pages := saved.get("pages"), dict):
            raise ValueError(f"snapshot: {self.name} lacks its pages")
        self.pages.load(pages)


def _reported(segments: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The whole pages of a buffer as runs, each once; of a longer one than any driver's, the first.

    Where memory is in pieces each frame may cost as much as a page that is moved.
    """
    runs: list[tuple[int, int]] = []
    left = MOST_REPORTED
    for gfn, frames in joined([run for run in starmap(_whole, segments) if run[1] > 0]):
        if not left:
            break
        runs.append((gfn, min(frames, left)))
        left -= runs[-1][1]
    return runs


def _whole(gpa: int, size: int) -> tuple[int, int]:
    """The whole pages in a run of bytes."""
    first = gpa + PAGE - 1 >> PAGE_SHIFT
    return first, (gpa + size >> PAGE_SHIFT) - first


def _sum(count: int, more: int) -> int:
    return count + more & (1 << 64) - 1
