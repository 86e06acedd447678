"""What disks, network cards and shared folders have in common: a name, and a slot of the PCI bus.

Source: ours.  Invariant: one that exists is right in itself; whether name and slot are free is
found out when it is plugged in.
"""

import re
from dataclasses import dataclass
from typing import Final

NAME_FORM: Final = "name= of at most 20 small letters, digits and -"
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,19}")


@dataclass(frozen=True, kw_only=True)
class Slotted:
    """One of them."""

    name: str = ""
    """By which it is unplugged; empty: disk0, net0, share0 and so on."""
    slot: int = 0
    """Its device number on the PCI bus; 0: the next that is free."""

    @property
    def place_problem(self) -> str:
        """What was expected of name and slot; empty if they are right."""
        if type(self.name) is not str or (self.name and not _NAME.fullmatch(self.name)):
            return NAME_FORM
        is_slot = type(self.slot) is int and 0 <= self.slot < 32
        return "" if is_slot else "a slot from 0 to 31"
