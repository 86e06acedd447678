"""One command in a guest with standard input as it comes, or with the user's terminal.

What: `run --exec` with `--stdin` or `--tty`.  Source: none.
Invariants: what is read ahead of the command is bounded; the terminal is as it was found, however
this ends; what a terminal's user types goes to the command, but for the escape key.
"""

import os
from contextlib import ExitStack
from typing import Final

from understudy.agent.command import Terminal
from understudy.agent.running import Command, Stream
from understudy.commands.progress import StatusLine
from understudy.linux import VM
from understudy.terminal import (
    ESCAPE_NAME,
    EscapeKey,
    Input,
    Output,
    RawMode,
    Wish,
    note,
    window_sizes,
)

UNSENT: Final = 1 << 16  # bytes that the command has not read when no more is taken
ENDED_BY_USER: Final = 1  # status


def stream(
    vm: VM, command: str, line: StatusLine, *, has_terminal: bool, timeout_wall_s: float
) -> int:
    """Run it until it ends, or its user ends it; its status.  The guest's agent is there."""
    with ExitStack() as stack:
        window: list[tuple[int, int]] = []
        if has_terminal:
            line.clear()
            vm.on_slice = None  # the terminal is the command's now
            stack.enter_context(RawMode(0))
            stack.enter_context(window_sizes(lambda rows, columns: window.append((rows, columns))))
        terminal = Terminal(*window.pop() if window else ()) if has_terminal else None
        keyboard = stack.enter_context(Input(0))
        running = stack.enter_context(
            vm.start(
                command,
                has_input=not has_terminal,
                terminal=terminal,
                env={"TERM": os.environ.get("TERM", "linux")} if has_terminal else None,
                timeout_guest_s=1e8,  # as long as it likes
                timeout_wall_s=timeout_wall_s,
            )
        )
        running.looks_up = True
        hand = _ByHand() if has_terminal else None
        screens = {Stream.OUT: Output(1), Stream.ERROR: Output(2)}
        while not running.is_over:
            if window:
                while window:  # a signal may add one at any time
                    size = window.pop(0)
                running.resize(*size)
            if running.unsent < UNSENT:
                typed = keyboard.take()
                if hand is not None and not hand.pass_on(typed, running):
                    note("ended by the user")
                    return ENDED_BY_USER
                if hand is None and typed:
                    running.send(typed)
                if keyboard.is_over:
                    running.close_input()
            for one, data in running.listen():
                line.clear()
                screens[one](data)
        line.clear()
        assert running.status is not None
        return running.status


class _ByHand:
    """What a user types."""

    def __init__(self) -> None:
        self.escape = EscapeKey()

    def pass_on(self, typed: bytes, running: Command) -> bool:
        """Give it to the command; False if the user wants to end."""
        for part in self.escape.feed(typed):
            if isinstance(part, bytes):
                if running.takes_input:  # it may have closed its terminal, and live on
                    running.send(part)
            elif part is Wish.QUIT:
                return False
            else:
                note(f"{ESCAPE_NAME} q ends the command, {ESCAPE_NAME} {ESCAPE_NAME} is sent to it")
        return True
