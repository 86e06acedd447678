"""A status line on standard error while something takes long.

What: guest time, instructions and MIPS of a running guest; bytes of a download.  Source: none.
Invariants: silent for the first two seconds, silent when standard error is no terminal, and gone
without a trace when it ends.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from understudy.visible import visible

PATIENCE_S = 2.0


class StatusLine:
    """One line that says what is going on; `say` is cheap and may be called often."""

    def __init__(
        self,
        title: str,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._title = title
        self._console = console or Console(stderr=True)
        self._now = now
        self._patience_s = patience_s
        self._started = now()
        self._last_s, self._last_instructions = self._started, 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.clear()

    @property
    def shown(self) -> bool:
        """Whether the line is on the screen now."""
        return self._live is not None

    def running(self, guest_ns: int, instructions: int) -> None:
        """Say how far a guest has come: call it a few times a second."""
        now = self._now()
        span = now - self._last_s
        mips = (instructions - self._last_instructions) / span / 1e6 if span > 0 else 0.0
        self._last_s, self._last_instructions = now, instructions
        self.say(
            f"guest time {guest_ns / 1e9:7.2f} s   "
            f"{instructions / 1e6:9,.0f} M instructions   {mips:6,.0f} MIPS"
        )

    def say(self, text: str) -> None:
        """Show `text` after the title, once the patience has run out."""
        elapsed = self._now() - self._started
        able = self._console.is_terminal and not self._console.is_dumb_terminal
        if elapsed < self._patience_s or not able:
            return
        line = Text.assemble((self._title, "bold"), f"   {text}   ", (f"{elapsed:.0f} s", "dim"))
        line.no_wrap = True
        line.overflow = "ellipsis"
        if self._live is None:
            self._live = Live(
                line,
                console=self._console,
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
            )
            self._live.start(refresh=True)
        else:
            self._live.update(line, refresh=True)

    def clear(self) -> None:
        """Take the line away; a later `say` may bring it back."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class Steps:
    """What `fetch` is doing: a line with a bar on a terminal, else a line for each new step."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._line = StatusLine(title, self._console, patience_s=0.0)
        self._title = title
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._line.clear()

    def __call__(self, text: str, share: float | None) -> None:
        """Say `text`; `share` is how much of it is done, 0 to 1, if that is known."""
        text = visible(text)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._line.say(f"{bar(share)} {text}".strip())
        elif text != self._last:
            self._console.print(f"{self._title}: {text}", markup=False, highlight=False)
        self._last = text


def bar(share: float | None, width: int = 24) -> str:
    """A bar that is filled to `share`; nothing if that is not known."""
    if share is None:
        return ""
    full = round(max(0.0, min(1.0, share)) * width)
    return f"{'█' * full}{'░' * (width - full)} {share:4.0%}"
