"""Which of a guest's frames is swapped out next: policies, each with a name.

    class Lowest(Victims, name="lowest"):
        def order(self, p2m, frames):
            return frames

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Page Replacement": random,
so that the host's choice and that of a guest which swaps itself cannot conspire; clock: Corbato, "A
Paging Experiment with the Multics System".
Invariant: the same calls give the same victims, in each run.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import ClassVar, Final

from understudy.machine.p2m import P2m
from understudy.machine.words import FRAMES, PRESENT
from understudy.own_class import chosen, is_own

TRIES: Final = 8  # frames that are drawn for each one wanted, before all are listed

MayGo = Callable[[int], bool]


class Victims(ABC):
    """A policy.  A subclass with a name can be chosen by it."""

    ALL: ClassVar[dict[str, type["Victims"]]] = {}
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        if not is_own(cls):
            Victims.ALL[name] = cls

    @abstractmethod
    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        """These frames (gfn, rising), the one that is to go first at the beginning."""

    def choose(self, p2m: P2m, count: int, may_go: MayGo) -> list[int]:
        """So many frames that may go, or all of them."""
        return self.order(p2m, list(filter(may_go, _present(p2m))))[:count]

    def came(self, p2m: P2m, gfn: int) -> None:  # noqa: B027
        """A frame was read in."""

    def leave(self, p2m: P2m) -> None:  # noqa: B027
        """A guest takes no part any more."""


Wish = str | Path | Victims | type[Victims]


def victims_of(wish: Wish) -> Victims:
    """The policy that was wished for: by name, by the path of a file, a class or an object."""
    return chosen(wish, Victims, Victims.ALL, ValueError, "swap policy")  # type: ignore[type-abstract]


def _present(p2m: P2m) -> list[int]:
    return [
        gfn for start, word, frames in p2m.pieces() if word & PRESENT
        for gfn in range(start, start + frames)
    ]  # fmt: skip


class Random(Victims, name="random"):
    """Any of them, by a generator that begins at the same number in each run."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        return self._random.sample(frames, len(frames))

    def choose(self, p2m: P2m, count: int, may_go: MayGo) -> list[int]:
        """Drawn from all guest frames: to list those that may go would take longer."""
        blocks = p2m.blocks()
        found: dict[int, None] = {}
        for _ in range(TRIES * count if blocks else 0):
            number = self._random.randrange(len(blocks) * FRAMES)
            gfn = blocks[number // FRAMES] + number % FRAMES
            if gfn not in found and may_go(gfn):
                found[gfn] = None
                if len(found) == count:
                    return list(found)
        return super().choose(p2m, count, may_go)


class Clock(Victims, name="clock"):
    """A hand goes round; who was read in since it came by last is let off once."""

    def __init__(self) -> None:
        self._hands: dict[P2m, int] = {}
        self._fresh: dict[P2m, set[int]] = {}

    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        hand = self._hands.get(p2m, 0)
        return [gfn for gfn in frames if gfn >= hand] + [gfn for gfn in frames if gfn < hand]

    def choose(self, p2m: P2m, count: int, may_go: MayGo) -> list[int]:
        fresh = self._fresh.get(p2m, set())
        found: dict[int, None] = {}
        ahead = self.order(p2m, _present(p2m))
        for gfn in chain(ahead, ahead):
            if len(found) == count:
                break
            self._hands[p2m] = gfn + 1
            if gfn in fresh:
                fresh.discard(gfn)
            elif may_go(gfn):
                found[gfn] = None
        return list(found)

    def came(self, p2m: P2m, gfn: int) -> None:
        self._fresh.setdefault(p2m, set()).add(gfn)

    def leave(self, p2m: P2m) -> None:
        self._hands.pop(p2m, None)
        self._fresh.pop(p2m, None)


class Oldest(Victims, name="oldest"):
    """Who was read in longest ago; before all others who never was."""

    def __init__(self) -> None:
        self._came: dict[P2m, dict[int, int]] = {}
        self._count = 0

    def order(self, p2m: P2m, frames: list[int]) -> list[int]:
        came = self._came.get(p2m, {})
        return sorted(frames, key=lambda gfn: (came.get(gfn, 0), gfn))

    def came(self, p2m: P2m, gfn: int) -> None:
        self._count += 1
        self._came.setdefault(p2m, {})[gfn] = self._count

    def leave(self, p2m: P2m) -> None:
        self._came.pop(p2m, None)
