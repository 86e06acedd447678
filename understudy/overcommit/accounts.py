"""What each VM has of its host's frames, kind by kind, and where in its memory.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".
Invariants: the kinds of a VM's pages add up to its size; what all consume, what is free and what
the hypervisor has itself add up to the host's frames.  A frame that several share is on the account
of the first VM that has it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from understudy.arch.address import PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.words import PRESENT, Flag
from understudy.overcommit.holding import Holding
from understudy.overcommit.stock import Stock
from understudy.overcommit.working_set import WorkingSet


class Kind(StrEnum):
    """What a guest's page is to its host."""

    OWN = "own"  # a frame that is its alone
    SHARED = "shared"  # one that others have as well
    ZERO = "zero"  # the same, and nothing is in it
    SAMPLED = "sampled"  # its own, and it is watched whether the guest needs it
    SWAPPED = "swapped"
    BALLOONED = "ballooned"
    FREE = "free"  # the guest has never used it, or does not need what was in it


_AWAY: Final = {
    Flag.SWAPPED: Kind.SWAPPED, Flag.BALLOONED: Kind.BALLOONED, Flag.FREE: Kind.FREE,
}  # fmt: skip
CELLS: Final = 256  # of a map


@dataclass(frozen=True)
class Account:
    """One VM's, in pages."""

    name: str
    size: int
    kinds: dict[Kind, int]
    consumed: int
    """Frames that are on its account."""
    hints: int
    """Of its own: those that were hashed, and may be found to be like another."""
    swapped_in: int
    """Ever."""
    active: int
    overhead: int
    """What was promised to it beside its memory."""
    target: int
    """What it is to have now."""
    why: str
    map: str
    """`CELLS` letters, from its first page to its last: the kind that most pages there are."""

    @property
    def saved(self) -> int:
        """Frames that it would need more without sharing."""
        return sum(self.kinds[kind] for kind in (*_THERE, Kind.SAMPLED)) - self.consumed


@dataclass(frozen=True)
class Accounts:
    """A host's, in frames."""

    total: int
    free: int
    own: int
    """What the hypervisor has itself: tables, and what only snapshots still have."""
    in_file: int
    """Pages in the swap file."""
    state: str
    why: str
    vms: tuple[Account, ...]

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        told = asdict(self)
        for vm, account in zip(told["vms"], self.vms, strict=True):
            vm["kinds"] = {str(kind): count for kind, count in account.kinds.items()}
            vm["saved"] = account.saved
        return told


_THERE: Final = (Kind.OWN, Kind.SHARED, Kind.ZERO)
LETTERS: Final = dict(zip(Kind, "osz?wb.", strict=True))


def accounts(stock: Stock) -> Accounts:
    """All of them, now.  Takes a look at each frame that is shared: not for every second."""
    hints = stock.sharing.hints_by() if stock.sharing is not None else Counter()
    seen: dict[int, bool] = {}  # pfn of a shared frame: whether it is all zero
    vms = tuple(_account(stock, one, hints[one.p2m], seen) for one in stock.holdings.values())
    free = stock.host.frames.free_count
    consumed = sum(vm.consumed for vm in vms)
    in_file = stock.swap.in_file if stock.swap is not None else 0
    state = stock.shortage.state.name.lower()
    return Accounts(
        stock.host.frames.count, free, stock.host.frames.count - free - consumed, in_file, state,
        stock.why, vms,
    )  # fmt: skip


def _account(stock: Stock, one: Holding, hints: int, seen: dict[int, bool]) -> Account:
    kinds: dict[Kind, int] = dict.fromkeys(Kind, 0)
    cells: list[Counter[Kind]] = [Counter() for _ in range(CELLS)]
    at, known = 0, len(seen)
    for kind, count in _runs(stock, one, seen):
        kinds[kind] += count
        while count:
            cell = at * CELLS // one.maximum
            part = min(count, -(-(cell + 1) * one.maximum // CELLS) - at)
            cells[cell][kind] += part
            at, count = at + part, count - part
    consumed = kinds[Kind.OWN] + kinds[Kind.SAMPLED] + len(seen) - known
    drawn = "".join(LETTERS[cell.most_common(1)[0][0]] if cell else " " for cell in cells)
    sampler = one.sampler
    return Account(
        one.name, one.maximum, kinds, consumed, hints, one.swapped_in(),
        sampler.active if sampler is not None else 0, one.overhead, one.target, one.why, drawn,
    )  # fmt: skip


def _runs(stock: Stock, one: Holding, seen: dict[int, bool]) -> Iterator[tuple[Kind, int]]:
    """The kinds of its pages, in order."""
    sampler = one.p2m.owners.get(Flag.SAMPLED)  # the host's, or somebody else's
    for gfn, word, count in one.p2m.pieces():
        if word & PRESENT:
            yield from _there(stock.host, Kind.OWN, word >> PAGE_SHIFT, count, seen)
        elif word & Flag.SAMPLED and isinstance(sampler, WorkingSet):
            for frame in range(gfn, gfn + count):
                yield from _there(stock.host, Kind.SAMPLED, sampler.kept(frame), 1, seen)
        else:
            yield next(kind for flag, kind in _AWAY.items() if word & flag), count


def _there(
    host: Host, alone: Kind, first: int, count: int, seen: dict[int, bool]
) -> Iterator[tuple[Kind, int]]:
    """The same where there are host frames: `alone` is what those are that nobody else has."""
    if host.frames.sole(first, count) == count:
        yield alone, count
        return
    for pfn in range(first, first + count):
        if host.frames.references(pfn) == 1:
            yield alone, 1
            continue
        if pfn not in seen:
            seen[pfn] = not any(host.contents(pfn))
        yield Kind.ZERO if seen[pfn] else Kind.SHARED, 1
