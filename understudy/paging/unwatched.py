"""Writes to traced tables by a processor that no shadow keeps from them.

A processor in real-address mode translates by an EPT (`real_mode`), which lets it write to all of
RAM.  What it has written is found when another processor begins its turn, or it pages itself: the
traced tables are compared with what they were when its turn began.

Source: ours.  Invariant: no processor uses a shadow while there may be such a write.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.state import restore

NOBODY: Final = -1


class Unwatched:
    """What one of the VM's processors may have done."""

    def __init__(
        self, traced: Iterable[int], read: Callable[[int], bytes],
        written: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """read: a frame of the guest, if it is there.  written: is told of each changed one."""
        self._traced, self._read, self._written = traced, read, written
        self._who = NOBODY  # whose turn it is, if it is unseen
        self._before: dict[int, bytes] = {}  # the tables when it began

    def begin_turn(self, who: int, *, is_seen: bool) -> None:
        """This processor is going to execute."""
        if who == self._who and not is_seen:
            return
        if self._who != NOBODY:
            self.end()
        if not is_seen:
            self._who = who
            self._before = {gfn: self._read(gfn) for gfn in self._traced}

    def change(self, who: int, *, is_seen: bool) -> None:
        """This processor, whose turn it may be, translates by shadows from now on, or no more."""
        if not is_seen:
            self.begin_turn(who, is_seen=False)
        elif who == self._who:
            self.end()

    def end(self) -> None:
        """Find out what it has written."""
        before, self._before, self._who = self._before, {}, NOBODY
        for gfn in sorted(before):
            if gfn in self._traced and self._read(gfn) != before[gfn]:
                self._written(gfn << PAGE_SHIFT, PAGE)

    def save(self) -> dict[str, Any]:
        """Whose turn it is, and the tables that have changed already, as they were."""
        changed = {gfn: old for gfn, old in self._before.items() if self._read(gfn) != old}
        return {"who": self._who, "changed": [[gfn, old.hex()] for gfn, old in changed.items()]}

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved; the tables are traced again."""
        self._who = restore(int, saved["who"], "who")
        changed = restore(list[tuple[int, str]], saved["changed"], "changed")
        self._before = {}
        if self._who != NOBODY:
            self._before = {gfn: self._read(gfn) for gfn in self._traced}
            self._before |= {gfn: bytes.fromhex(old) for gfn, old in changed}
