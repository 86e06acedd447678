"""What one vCPU counts: its exits by reason, and its accesses to control registers.

Source: ours.  Invariant: the counts are objects of which others may keep hold; a snapshot that is
loaded changes what is in them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from understudy.arch.exit_reason import Reason, reason_name
from understudy.silicon import Exit
from understudy.state import Part, restore

LAST_EXIT: Final = 0xFFFF  # reasons above it are the silicon's own stops
KINDS: Final = {0: "write", 1: "read", 2: "CLTS", 3: "LMSW"}
CR_ACCESSES: Final = {number << 4 | kind for number in range(16) for kind in KINDS}


@dataclass
class CountState:
    """All of it."""

    exits: dict[int, int] = field(default_factory=dict)  # by reason
    cr_accesses: Counter[int] = field(default_factory=Counter)  # by number << 4 | kind


def no_handler(exit: Exit, rip: int) -> str:
    """What to say of an exit that nothing answers."""
    return (
        f"exit {reason_name(exit.reason)} ({exit.reason}) at rip {rip:#x} has no handler: "
        f"qualification {exit.qualification:#x} length {exit.length} gla {exit.gla:#x} "
        f"gpa {exit.gpa:#x} intr_info {exit.intr_info:#x} idt_info {exit.idt_info:#x}"
    )


class ExitCounts(Part):
    """The counts of one vCPU."""

    state: CountState

    def __init__(self, reasons: Iterable[int]) -> None:
        """`reasons`: those that are answered, which begin with 0."""
        self.state = CountState(dict.fromkeys(reasons, 0))

    def load(self, saved: dict[str, Any]) -> None:
        found = restore(CountState, saved, "counts")
        for key in found.cr_accesses:
            if key not in CR_ACCESSES:
                raise ValueError(f"snapshot: counts.cr_accesses has {key}, which is none")
        self.state.exits.update(found.exits)
        self.state.cr_accesses.update(found.cr_accesses)

    def named_exits(self) -> dict[str, int]:
        """Exits by name, those that happened.

        The silicon's own stops are no exits; nor are kicks counted here (see `kicks`), because
        the guest has no part in them.
        """
        exits = self.state.exits
        own = (n for n in exits if n <= LAST_EXIT and n != Reason.EXTERNAL_INTERRUPT)
        counted = sorted((n, exits[n]) for n in own if exits[n])
        return {reason_name(n): count for n, count in counted}

    def named_cr_accesses(self) -> dict[str, int]:
        """Exits for control registers, by register and direction."""
        counted = sorted(self.state.cr_accesses.items())
        return {f"CR{key >> 4} {KINDS[key & 15]}": n for key, n in counted}

    @property
    def kicks(self) -> int:
        """Exits because another thread wanted something."""
        return self.state.exits[Reason.EXTERNAL_INTERRUPT]
