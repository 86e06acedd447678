"""A guest and the user: its console in a terminal or a pipe, or one command run in it.

What: moves bytes both ways while the guest runs in short slices, and says how it ended.
Source: none.
Invariants: the guest's bytes go to standard output unchanged and whole; what understudy itself
says goes to standard error; what was piped in has been carried out before its end ends anything.
"""

import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack

from understudy.agent.mounting import mounted
from understudy.agent.steps import Unattended
from understudy.commands import Refusal
from understudy.commands.last_line import SLICE_S as LINE_S
from understudy.commands.last_line import LastLine, Rates
from understudy.commands.progress import StatusLine
from understudy.commands.streams import stream
from understudy.last_words import NOTHING_PRINTED, ending, reason
from understudy.linux import VM
from understudy.linux_session import SLICE_S
from understudy.terminal import (
    ESCAPE_NAME,
    HELP_TEXT,
    EscapeKey,
    Input,
    Output,
    RawMode,
    Wish,
    note,
    window_sizes,
)
from understudy.verdict import Stop, StopKind

# What is piped in is typed at the first prompt, or when the guest has run for this long.
HOLD_NS = 10_000_000_000
DONE_NS = 1_000_000_000  # and what is silent for this long at a shell's prompt waits for its user
SETTLE_NS = 20_000_000  # what is still the end of the output after this long is a prompt
_PROMPT = re.compile(rb"[#$>:] (?:\x1b\[6n)?\Z")
_SHELL_PROMPT = re.compile(rb"[#$>] (?:\x1b\[6n)?\Z")


def converse(
    vm: VM,
    timeout_s: float | None,
    line: StatusLine,
    *,
    interactive: bool,
    watch: bool = False,
    stays: bool = False,
) -> int:
    """Connect the guest's console with standard input and output until it ends; the status.

    What is piped in is typed at the guest's prompt; when all of it is done and the guest is back at
    its prompt, the run ends, unless it `stays`.
    """
    with ExitStack() as stack:
        session = _Session(vm, line, timeout_s, interactive, stays=stays)
        if vm.config.folders:
            _mount(vm)
            vm.on_reset.append(lambda: _mount(vm))
        if interactive:
            note(f"{ESCAPE_NAME} h shows the keys, {ESCAPE_NAME} q ends the guest")
            stack.enter_context(RawMode(0))
            stack.callback(session.last_line.hide)
            stack.enter_context(window_sizes(session.resized))
            if watch:
                session.watch()
        if _is_file(0):
            session.type_later(_all_of(0))  # all of it at once: when it comes is no accident
            session.is_input_over = True
        elif interactive or not os.isatty(0):
            session.listen(stack.enter_context(Input(0, session.arrived)))
        stop = session.run(Output(1))
    if stop is None:
        if session.is_done:
            note("standard input has ended, and the guest is back at its prompt: ended")
            return 0
        note("ended by the user")
        return 1
    return _status(vm, stop)


def execute(
    vm: VM,
    command: str,
    timeout_s: float | None,
    line: StatusLine,
    *,
    takes_input: bool = False,
    has_terminal: bool = False,
) -> int:
    """Boot, run one command, print what it prints and nothing else, where it does; its status.

    takes_input: its standard input is ours, as it comes.  has_terminal: our terminal is its.
    """
    ends_at = time.monotonic() + timeout_s if timeout_s is not None else None

    def shown_by(screen: Output) -> Callable[[bytes], None]:
        def show(data: bytes) -> None:
            line.clear()
            screen(data)

        return show

    def left(default: float) -> float:
        return max(0.001, ends_at - time.monotonic()) if ends_at is not None else default

    vm.on_slice = lambda: line.running(vm.clock.now(), vm.instructions)
    vm.wait_for_agent(timeout_wall_s=left(600.0))
    # A command may take as long as it likes unless --timeout says otherwise.
    forever_s = 1e8
    if takes_input or has_terminal:
        return stream(vm, command, line, has_terminal=has_terminal, timeout_wall_s=left(forever_s))
    result = vm.run(
        command,
        input=_all_of(0) if _is_file(0) else None,
        timeout_guest_s=forever_s,
        timeout_wall_s=left(forever_s),
        on_output=shown_by(Output(1)),
        on_error=shown_by(Output(2)),
    )
    line.clear()
    return result.status


def _mount(vm: VM) -> None:
    """Have the folders that the guest shares mounted in it, as soon as that can be."""
    Unattended(vm.session.channel, mounted(vm.config), lambda problem: note(str(problem)))


class _Session:
    """One guest with one user, until either ends it."""

    def __init__(
        self,
        vm: VM,
        line: StatusLine,
        timeout_s: float | None,
        interactive: bool,
        *,
        stays: bool = False,
    ) -> None:
        self._vm = vm
        self._line = line
        self._interactive = interactive
        self._ends_at = time.monotonic() + timeout_s if timeout_s is not None else None
        self._escape = EscapeKey()
        self.last_line = LastLine(Output(1))
        self._rates = Rates()
        self._window = (0, 0)
        self._keyboard: Input | None = None
        self._quits = False
        self._looks_after = False  # the run has been stopped for what we show, and goes on
        # What comes by a pipe waits for a prompt: a kernel that starts its serial driver throws
        # away what has been typed.  A guest without prompts gets it a little later.
        self._held = bytearray()
        self._holds = not interactive
        self._tail = b""
        self._looks = False
        self._spoke_ns = 0
        # A pipe ends; so does the run then, when the guest has done what it was told.
        self._ends = not interactive and not stays
        self.is_input_over = False
        self.is_done = False

    def run(self, screen: Output) -> Stop | None:
        """Go on until the guest stops (the result says why) or the user quits (None)."""
        vm = self._vm

        def show(data: bytes) -> None:
            self._line.clear()
            screen(data)
            self.last_line.heard(data)
            if self._holds or self._ends:
                self._tail = (self._tail + data)[-64:]
                self._spoke_ns = vm.clock.now()
                if not self._looks and self._expected.search(self._tail):
                    self._looks = True
                    vm.clock.at(self._spoke_ns + self._silence_ns, self._look)

        vm.console.on_output.append(show)
        if self._holds:
            vm.clock.at(vm.clock.now() + HOLD_NS, self._release)
        while True:
            stop = vm.go(wall_seconds=self._slice_s(quiet=not screen.wrote))
            if self._quits or (self.is_done and stop.kind is StopKind.STOPPED):
                return None
            if self._looks_after and stop.kind == StopKind.STOPPED:
                self._looks_after = False
            elif stop.kind != StopKind.WALL:
                return stop
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                line = "the time that --timeout gave is over; the guest was still running"
                raise Refusal(f"{line}{self._hint()}")
            if self.last_line.is_shown:
                self.last_line.draw(self._rates.line(vm.clock.now(), vm.counts()))
            elif not screen.wrote:
                self._line.running(vm.clock.now(), vm.instructions)

    def resized(self, rows: int, columns: int) -> None:
        """The window has this size now: the guest gets what the last line leaves."""
        self._window = (rows, columns)
        self.last_line.resized(rows, columns)
        self._vm.resize_console(rows - self.last_line.rows, columns)

    def watch(self) -> None:
        """Show what is counted in the last line from now on."""
        self._line.clear()
        if not self.last_line.show():
            note("the window has too few rows for a line of counts")
            return
        self.resized(*self._window)
        self.last_line.draw(self._rates.line(self._vm.clock.now(), self._vm.counts()))

    def _slice_s(self, *, quiet: bool) -> float | None:
        """How long the guest may run on its own: a status line wants to be looked after."""
        left = self._ends_at - time.monotonic() if self._ends_at is not None else None
        if self.last_line.is_shown:
            return LINE_S if left is None else min(left, LINE_S)
        if not quiet:
            return left
        return SLICE_S if left is None else min(left, SLICE_S)

    def listen(self, keyboard: Input) -> None:
        """Take what is typed from here."""
        self._keyboard = keyboard
        self.arrived()

    def arrived(self) -> None:
        """Something was typed: see to it on the VM's thread.  Called on the reader's."""
        self._vm.post(self._take)

    def type_later(self, typed: bytes) -> None:
        """Type this as soon as the guest has shown a prompt."""
        self._held += typed
        if not self._holds:
            self._release()

    @property
    def _expected(self) -> re.Pattern[bytes]:
        """What the end of the output must look like for something to follow from it."""
        return _PROMPT if self._holds else _SHELL_PROMPT

    @property
    def _silence_ns(self) -> int:
        return SETTLE_NS if self._holds else DONE_NS

    def _look(self) -> None:
        """Was it a prompt, or the middle of a line?"""
        clock = self._vm.clock
        silent_ns = clock.now() - self._spoke_ns
        is_prompt = self._expected.search(self._tail) is not None
        self._looks = is_prompt and silent_ns < self._silence_ns
        if self._looks:
            clock.at(self._spoke_ns + self._silence_ns, self._look)
        elif is_prompt and self._holds:
            self._release()
        elif is_prompt:
            self._end_if_over()

    def _release(self) -> None:
        self._holds = False
        typed = bytes(self._held)
        self._held.clear()
        if typed:
            self._tail = b""  # the prompt has been answered
            self._vm.console.receive(typed)
        elif _SHELL_PROMPT.search(self._tail):
            self._end_if_over()

    def _end_if_over(self) -> None:
        """The guest waits at its prompt: is there anything that may still be typed?"""
        if self._ends and self.is_input_over and not self._held:
            self.is_done = True
            self._vm.stop("standard input has ended")

    def _hint(self) -> str:
        """What the guest's console says about why it did not end, or that it says nothing."""
        text = self._vm.console_text
        if not text:
            return f"; {NOTHING_PRINTED}"
        why = reason(text)
        return f"; it said: {why}" if why is not None else ""

    def _take(self) -> None:
        if self._keyboard is None:
            return
        typed = self._keyboard.take()
        if not self._interactive:
            self.is_input_over = self._keyboard.is_over
            self.type_later(typed)
            return
        for part in self._escape.feed(typed):
            match part:
                case bytes():
                    self._vm.console.receive(part)
                case Wish.QUIT:
                    self._quits = True
                    self._vm.stop("the user")
                case Wish.COUNTS:
                    note(counts_in_words(self._vm))
                case Wish.LINE if self.last_line.is_shown:
                    self.last_line.hide()
                    self.resized(*self._window)
                case Wish.LINE:
                    self.watch()
                    self._looks_after = True
                    self._vm.stop("to look after the last line")
                case Wish.HELP:
                    note(HELP_TEXT)


def counts_in_words(vm: VM) -> str:
    """The most telling of what was counted, for people."""
    counts = vm.counts()
    exits = sorted(counts["exits"].items(), key=lambda item: -item[1])
    lines = [
        f"guest time {vm.clock.now() / 1e9:.2f} s, {counts['instructions']:,} instructions, "
        f"{sum(number for _, number in exits):,} exits:"
    ]
    return "\n".join(lines + [f"  {name:28} {number:12,}" for name, number in exits[:8]])


def _status(vm: VM, stop: Stop) -> int:
    """The status for the shell after a guest has ended by itself."""
    match stop.kind:
        case StopKind.POWEROFF:
            if not vm.console_text:
                note(NOTHING_PRINTED)
            return 0
        case StopKind.DEBUG_EXIT:
            return stop.status or 0
        case _:
            how = ending(stop, vm.console_text)
            hint = "" if vm.console_text else f"; {NOTHING_PRINTED}"
            raise Refusal(f"the guest ended: {how}{hint}", detail=vm.state_in_words(stop))


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False  # no standard input at all


def _all_of(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as file:
        return file.read()
