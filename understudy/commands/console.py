"""A guest and the user: its console in a terminal or a pipe, or one command run in it.

What: moves bytes both ways while the guest runs in short slices, and says how it ended.
Source: none.
Invariants: the guest's bytes go to standard output unchanged and whole; what understudy itself
says goes to standard error; end of input does not end the guest.
"""

import stat
import sys
import os
import time
from contextlib import ExitStack

from understudy.commands import Refusal
from understudy.commands.progress import StatusLine
from understudy.linux import VM
from understudy.terminal import (
    ESCAPE_NAME,
    HELP_TEXT,
    EscapeKey,
    Input,
    Output,
    RawMode,
    Wish,
    note,
)
from understudy.vm import Stop

# A guest that makes no exits is looked after this often; a key typed wakes it at once.
SLICE_S = 0.05


class _Quit(Exception):
    """The user asked for the end with the escape key."""


class Session:
    """One guest with one user, until either ends it."""

    def __init__(self, vm: VM, line: StatusLine, timeout_s: float | None) -> None:
        self._vm = vm
        self._line = line
        self._ends_at = time.monotonic() + timeout_s if timeout_s is not None else None
        self._escape = EscapeKey()

    def run(self, keyboard: Input | None, screen: Output, *, interactive: bool) -> Stop | None:
        """Go on until the guest stops (the result says why) or the user quits (None)."""
        vm = self._vm

        def show(data: bytes) -> None:
            self._line.clear()
            screen(data)

        vm.console.on_output.append(show)
        waiting = keyboard.waiting if keyboard is not None else None
        while True:
            stop = vm.go(until=waiting, wall_seconds=SLICE_S)
            if stop.kind not in ("until", "wall"):
                return stop
            if keyboard is not None and not self._pass_on(keyboard.take(), interactive):
                return None
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                raise Refusal("the time that --timeout gave is over; the guest was still running")
            if not screen.wrote:
                self._line.running(vm.now_ns, vm.instructions)

    def _pass_on(self, typed: bytes, interactive: bool) -> bool:
        """Give what was typed to the guest, see to the wishes; False: the user quits."""
        if not interactive:
            self._vm.console.send(typed)
            return True
        for part in self._escape.feed(typed):
            match part:
                case bytes():
                    self._vm.console.send(part)
                case Wish.QUIT:
                    return False
                case Wish.COUNTS:
                    note(self._vm.counts_in_words())
                case Wish.HELP:
                    note(HELP_TEXT)
        return True
