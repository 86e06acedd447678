"""Campaigns against the walls: random hostile input, round after round, with what must hold.

A part is one wall: `rounds` of it belong to `make test`; `make fuzz-walls` goes on for as long as
it is told.  A round is made by a `random.Random` alone, so its seed is all that is needed to see a
failure again.  What is asked for may be a file of any name, so each part has a folder of its own
as the current one.  Adding one: a module in this folder with a function under `@part`.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, contextmanager
from tempfile import TemporaryDirectory
from typing import NamedTuple

Round = Callable[[random.Random], None]
"""One round; it raises if something does not hold."""


class Part(NamedTuple):
    """One wall: what must be there for its rounds, and how many of them belong to `make test`."""

    setting: Callable[[], AbstractContextManager[Round]]
    rounds: int
    boots: bool  # a guest that must be fetched


PARTS: dict[str, Part] = {}


def part(rounds: int, *, boots: bool = False) -> Callable[[Callable[[], Iterator[Round]]], None]:
    """Put the setting of a part, a generator of its one `Round`, into the table."""

    def add(setting: Callable[[], Iterator[Round]]) -> None:
        @contextmanager
        def elsewhere() -> Iterator[Round]:
            with TemporaryDirectory() as folder, chdir(folder), contextmanager(setting)() as one:
                yield one

        PARTS[setting.__name__] = Part(elsewhere, rounds, boots)

    return add


def chance(name: str, seed: int, number: int) -> random.Random:
    """What decides one round."""
    return random.Random(f"{name} {seed} {number}")


for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")
