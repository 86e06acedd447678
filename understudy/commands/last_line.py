"""The terminal's last line, kept free for what a running guest is counted to do.

What: takes the last row away from the guest (a scrolling region above it), and shows there, twice
a second, how fast guest time and instructions go and which exits are the most.
Source: DEC STD 070, "Set Top and Bottom Margins", "Save Cursor", as every terminal of today has
them (console_codes(4)).
Invariants: nothing is drawn inside an escape sequence of the guest; however the line goes, the
whole screen is the guest's again and the cursor is where it was.
"""

import re
import time
from collections.abc import Callable
from typing import Any, Final

SLICE_S: Final = 0.5
FEWEST_ROWS: Final = 4
_UNFINISHED: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*|[()#])?\Z")  # CSI, OSC
_SAVE, _RESTORE = b"\x1b7", b"\x1b8"


class LastLine:
    """The last row of the terminal behind `write`, when it is shown."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._tail = b""
        self._rows, self._columns = 0, 0
        self._drawn = b""
        self.is_shown = False

    @property
    def rows(self) -> int:
        """How many rows the guest has to do without."""
        return 1 if self.is_shown else 0

    def heard(self, data: bytes) -> None:
        """The guest has printed this."""
        self._tail = (self._tail + data[-32:])[-32:]

    def resized(self, rows: int, columns: int) -> None:
        """The window has this size now."""
        if (rows, columns) == (self._rows, self._columns):
            return
        self._rows, self._columns = rows, columns
        if self.is_shown and rows >= FEWEST_ROWS:
            self._take_row()

    def show(self) -> bool:
        """Take the last row; False if the window is too small for that."""
        if not self.is_shown and self._rows >= FEWEST_ROWS:
            self.is_shown = True
            self._take_row()
        return self.is_shown

    def hide(self) -> None:
        """Give the row back; harmless when it was not taken."""
        if self.is_shown:
            self.is_shown = False
            self._write(_SAVE + b"\x1b[r\x1b[%d;1H\x1b[2K" % self._rows + _RESTORE)

    def draw(self, text: str) -> None:
        """Show `text`, if this is no time at which it would spoil what the guest draws."""
        if not self.is_shown or _UNFINISHED.search(self._tail):
            return
        line = text[: self._columns].ljust(self._columns).encode()
        self._drawn = line
        place = b"\x1b[%d;1H" % self._rows
        self._write(_SAVE + place + b"\x1b[0;7m" + line + b"\x1b[0m" + _RESTORE)

    def _take_row(self) -> None:
        """Scroll if the cursor is in the last row, then keep it out of there."""
        region = b"\x1b[1;%dr" % (self._rows - 1)
        self._write(b"\n\x1b[A" + _SAVE + region + _RESTORE)
        if self._drawn:
            self.draw(self._drawn.decode().rstrip())


class Rates:
    """What was counted since the last look, in one line."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._then = now()
        self._instructions = 0
        self._exits: dict[str, int] = {}

    def line(self, guest_ns: int, counts: dict[str, Any]) -> str:
        """Instructions and exits by their rates; the exits that came most often first."""
        now = self._now()
        span = max(now - self._then, 1e-3)
        instructions, exits = counts["instructions"], dict(counts["exits"])
        speed = (instructions - self._instructions) / span / 1e6
        news = {name: number - self._exits.get(name, 0) for name, number in exits.items()}
        self._then, self._instructions, self._exits = now, instructions, exits
        often = sorted((n for n in news.items() if n[1]), key=lambda item: -item[1])
        most = "  ".join(f"{name} {short(number / span)}/s" for name, number in often[:4])
        total = short(sum(news.values()) / span)
        return (
            f" {guest_ns / 1e9:.1f} s  {instructions / 1e6:,.0f} M instructions  "
            f"{speed:,.0f} MIPS  {total} exits/s: {most or 'none'}"
        )


def short(number: float) -> str:
    """A rate, in few characters."""
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"
