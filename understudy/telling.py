"""What some techniques tell of themselves, beside what all of them have.

Source: none.
"""

from abc import ABC, abstractmethod
from typing import Any


class Telling(ABC):
    """A guest, by a technique that has something of its own to tell."""

    @abstractmethod
    def own_counts(self) -> dict[str, Any]:
        """What it counts beside exits, as plain values."""


class Translating(Telling):
    """One that translates code."""

    @abstractmethod
    def keep_translations(self) -> None:
        """Use what earlier runs have left on disk, and leave there what this one adds."""

    @abstractmethod
    def unit(self, gva: int) -> str:
        """Translated code with the instruction there, beside the guest's.

        ValueError: there is none.
        """


def unit_of(guest: object, gva: int) -> str:
    """The same of any guest."""
    if isinstance(guest, Translating):
        return guest.unit(gva)
    raise ValueError(f"{gva:#x}: no code is translated: expected execution 'bt'")
