"""A session with the Linux in a VM: its console, and commands that run in it.

    session = Linux(machine.VM.restore(data))
    session.run("uname -a")

Source: none; commands and files go by the agent, see `understudy.agent`.
Invariants: each wait ends, by a limit in guest time, one in wall time, or the guest's own end, and
says which; however it ends (a callback's exception and Ctrl-C are ways, too), the next one works.
The session's state goes with the VM's snapshots.
"""

import re
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from understudy import vm as machine
from understudy.agent import command as commands
from understudy.agent.calls import O_CLOEXEC, O_NOCTTY, O_RDWR, Answer, Call, Request
from understudy.agent.channel import Channel, ChannelState
from understudy.agent.command import Job, Terminal, Wanted
from understudy.agent.connecting import Connecting
from understudy.agent.copying import Copying
from understudy.agent.mounting import mounted
from understudy.agent.result import GuestStopped, GuestTimeout, LinuxError, Result
from understudy.agent.running import Command, Stream, clear_up
from understudy.agent.setup import power_off, settle
from understudy.agent.steps import Ask, carried_out
from understudy.last_words import NOTHING_PRINTED, ending, last_lines, reason
from understudy.state import plain, restore
from understudy.verdict import Stop, StopKind

# How much of what the console showed is kept; a guest may print for ever.
CONSOLE_KEPT_BYTES = 1 << 20
# How much a command may print that nobody takes as it comes; of what is taken, a megabyte is kept.
OUTPUT_KEPT_BYTES = 1 << 28
# The shell prompts of busybox and of most others, at the end of what was printed.
PROMPT = rb"[#$] (?:\x1b\[6n)?\Z"

BOOT_GUEST_S, BOOT_WALL_S = 300.0, 600.0
COMMAND_GUEST_S, COMMAND_WALL_S = 600.0, 600.0
LAST_GUEST_S, LAST_WALL_S = 5.0, 10.0  # to end a command

_NS = 1_000_000_000
SLICE_S = 0.25  # `on_slice` is called this often


@dataclass(frozen=True)
class Limits:
    """How long something is waited for, and since when."""

    guest_s: float
    wall_s: float
    guest_ends_ns: int
    wall_ends_s: float


@dataclass
class LinuxState:
    """What a snapshot keeps of a session."""

    heard: bytearray = field(default_factory=bytearray)  # the end of what the console showed
    channel: ChannelState = field(default_factory=ChannelState)
    environment: list[bytes] | None = None  # of commands, once the agent has been asked
    jobs: list[Job] = field(default_factory=list)  # under way


class Linux(Copying, Connecting):
    """A session with the Linux in a VM.

    >>> with machine.VM.restore(data) as vm:  # doctest: +SKIP
    ...     Linux(vm).run("uname -s").output
    'Linux\\n'
    """

    def __init__(self, vm: machine.VM) -> None:
        self.vm, self.state = vm, LinuxState()
        self.on_slice: Callable[[], None] | None = None
        self._is_waiting = False
        self._listened_to: list[Job] = []
        self.channel = Channel(vm.pc)
        self.channel.state = self.state.channel
        vm.console.on_output.append(self._hear)
        vm.on_reset.append(self._restart)
        vm.sessions.attach("linux", self)

    def save(self) -> dict[str, Any]:
        """All that a snapshot must keep, as plain values."""
        saved: dict[str, Any] = plain(self.state)
        return saved

    def load(self, saved: dict[str, Any]) -> None:
        """Go on where the saved session was; a command under way is nobody's any more."""
        self._become(restore(LinuxState, saved, "Linux"))

    def _restart(self) -> None:
        """The guest starts again, and its agent with it."""
        self._become(LinuxState(heard=self.state.heard))

    def _become(self, state: LinuxState) -> None:
        self.state, self._listened_to = state, []
        self.channel.load(state.channel)

    def let_go(self) -> None:
        """The VM is closed: what was heard stays, and nothing holds the VM any more."""
        self.vm = weakref.proxy(self.vm)

    # --- The console ------------------------------------------------------------------------

    @property
    def console_text(self) -> str:
        """What the guest has printed on its console (the last megabyte of it)."""
        return self.state.heard.decode("utf-8", "replace").replace("\r\n", "\n")

    def send(self, text: str | bytes) -> None:
        """Type into the console; a line ends with "\\n"."""
        self.vm.console.send(text.encode() if isinstance(text, str) else text)

    def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest how large the window is that shows its console; does not wait for it.

        Nothing happens in a guest without the agent, or while it does something else.
        """
        if self.channel.is_there and self.channel.is_idle:
            request = Request()
            console = request.call(
                Call.OPEN, request.text("/dev/ttyS0"), O_RDWR | O_NOCTTY | O_CLOEXEC
            )
            window = request.keep(bytes(Terminal(rows, columns)))
            request.call(Call.IOCTL, console, commands.TIOCSWINSZ, window)
            request.call(Call.CLOSE, console)
            self.channel.send(request)

    def wait_for_prompt(
        self,
        prompt: bytes = PROMPT,
        *,
        timeout_guest_s: float = BOOT_GUEST_S,
        timeout_wall_s: float = BOOT_WALL_S,
    ) -> None:
        """Run until the console's last line ends like a shell prompt (`prompt`: a pattern)."""
        pattern = re.compile(prompt)

        def prompted() -> bool:
            return pattern.search(bytes(self.state.heard[-256:])) is not None

        self.run_until(prompted, "a prompt", timeout_guest_s, timeout_wall_s)

    def wait_for_text(
        self,
        text: str,
        *,
        timeout_guest_s: float = BOOT_GUEST_S,
        timeout_wall_s: float = BOOT_WALL_S,
    ) -> None:
        """Run until `text` has been printed on the console."""
        wanted = text.encode()
        self.run_until(
            lambda: wanted in self.state.heard, repr(text), timeout_guest_s, timeout_wall_s
        )

    # --- Commands ---------------------------------------------------------------------------

    def wait_for_agent(
        self, *, timeout_guest_s: float = BOOT_GUEST_S, timeout_wall_s: float = BOOT_WALL_S
    ) -> None:
        """Run until the guest takes commands: its user land is up."""
        self.run_until(
            lambda: self.channel.is_there,
            "understudy's agent (an initrd of one's own has none)",
            timeout_guest_s,
            timeout_wall_s,
        )

    def start(
        self,
        command: str | bytes,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        has_input: bool = False,
        terminal: Terminal | None = None,
        timeout_guest_s: float = COMMAND_GUEST_S,
        timeout_wall_s: float = COMMAND_WALL_S,
    ) -> Command:
        """Start a shell command in the guest; boots first if need be.

        `cwd` is where it begins, `env` is added to its environment.  It has a standard input if
        `has_input`, or a pseudo-terminal instead of all three streams.  The limits are for all of
        it: when one is over, the command is ended, with its process group, and GuestTimeout raised.
        """
        raw = command.encode("utf-8", "surrogateescape") if isinstance(command, str) else command
        shown = repr(raw.decode("utf-8", "replace"))
        self._refuse_if_waiting(f"run {shown}")
        awaited = f"the end of {shown}"
        ask = self.prepared(awaited, timeout_guest_s, timeout_wall_s)
        environment = commands.with_changes(self.state.environment or [], env or {})
        wanted = Wanted(raw, environment, cwd, terminal, has_input)
        job = carried_out(commands.start(wanted), ask)
        jobs, listened_to = self.state.jobs, self._listened_to
        jobs.append(job)
        listened_to.append(job)

        def at_last(request: Request) -> Answer:
            return self._asker(awaited, self._limits(LAST_GUEST_S, LAST_WALL_S))(request)

        def over(is_gone: bool) -> None:
            listened_to.remove(job)
            if is_gone:
                jobs.remove(job)

        return Command(job, ask, at_last, over, has_terminal=terminal is not None)

    def run(
        self,
        command: str | bytes,
        *,
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        terminal: Terminal | None = None,
        timeout_guest_s: float = COMMAND_GUEST_S,
        timeout_wall_s: float = COMMAND_WALL_S,
        on_output: Callable[[bytes], None] | None = None,
        on_error: Callable[[bytes], None] | None = None,
    ) -> Result:
        """Run a shell command in the guest and wait for its end; as `start`, with `input`.

        `on_output` gets the output as it comes, and the result has its last megabyte; with
        `on_error`, that gets what comes on standard error.  LinuxError if a command prints more
        than 256 MiB that nobody takes so.  However the wait ends, the command is ended by then.
        """
        kept: dict[Stream | None, bytearray] = {one: bytearray() for one in (None, *Stream)}
        takers = {Stream.OUT: on_output, Stream.ERROR: on_error or on_output}
        with self.start(
            command,
            cwd=cwd,
            env=env,
            has_input=input is not None,
            terminal=terminal,
            timeout_guest_s=timeout_guest_s,
            timeout_wall_s=timeout_wall_s,
        ) as running:
            if input is not None:
                running.send(input)
                running.close_input()
            for stream, data in running:
                taker = takers[stream]
                for one in (None, stream):
                    _keep(kept[one], data, is_taken=taker is not None)
                if taker is not None:
                    taker(data)
        raw, out, error = (bytes(one) for one in kept.values())
        assert running.status is not None
        return Result(
            raw.decode("utf-8", "replace"), running.status, raw, out, error, running.signal_number
        )

    def prepared(self, awaited: str, timeout_guest_s: float, timeout_wall_s: float) -> Ask:
        """What asks the agent, which is there and has nothing to do; boots first if need be."""
        self._refuse_if_waiting(f"wait for {awaited}")
        if not self.channel.is_there:
            self.wait_for_agent()
        ask = self._asker(awaited, self._limits(timeout_guest_s, timeout_wall_s))
        self._settle(ask)
        return ask

    def power_off(self, *, timeout_guest_s: float = 60.0, timeout_wall_s: float = 120.0) -> None:
        """Have the guest power itself off, and wait until it has."""
        self._refuse_if_waiting("power off")
        if not self.channel.is_there:
            self.wait_for_agent()
        try:
            limits = self._limits(timeout_guest_s, timeout_wall_s)
            carried_out(power_off(), self._asker("the power-off", limits))
        except GuestStopped as stopped:
            if stopped.stop.kind is not StopKind.POWEROFF:
                raise

    def _settle(self, ask: Ask) -> None:
        """Have the agent as it should be, with nothing to do."""
        state = self.state
        if state.environment is None:
            state.environment = carried_out(settle(), ask)
            carried_out(mounted(self.vm.config), ask)
        for job in [one for one in state.jobs if one not in self._listened_to]:
            state.jobs.remove(job)
            clear_up(ask, job)

    def _asker(self, awaited: str, limits: Limits) -> Ask:
        """What asks the agent within these limits."""

        def ask(request: Request) -> Answer:
            channel = self.channel
            if channel.is_there:
                channel.send(request)
                self._run(lambda: channel.has_answer or not channel.is_there, awaited, limits)
            if not channel.has_answer:  # it may be that the guest is about to end
                with suppress(GuestTimeout):
                    self._run(lambda: False, awaited, self._limits(LAST_GUEST_S, LAST_WALL_S))
                raise LinuxError(f"the guest's agent has gone before {awaited} came")
            return request.read(channel.take())

        return ask

    def _limits(self, guest_s: float, wall_s: float) -> Limits:
        ends_ns = self.vm.clock.now() + round(guest_s * _NS)
        return Limits(guest_s, wall_s, ends_ns, time.monotonic() + wall_s)

    # --- Running ----------------------------------------------------------------------------

    def run_until(
        self,
        done: Callable[[], bool],
        awaited: str,
        timeout_guest_s: float,
        timeout_wall_s: float,
    ) -> None:
        """Run until `done()`; GuestTimeout or GuestStopped says that `awaited` did not come."""
        self._run(done, awaited, self._limits(timeout_guest_s, timeout_wall_s))

    def _run(self, done: Callable[[], bool], awaited: str, limits: Limits) -> None:
        self._refuse_if_waiting(f"wait for {awaited}")
        if self.vm.is_closed:
            raise RuntimeError(f"{self.vm.name} is closed")
        self._is_waiting = True
        try:
            self._wait(done, awaited, limits)
        finally:
            self._is_waiting = False

    def _refuse_if_waiting(self, wish: str) -> None:
        if self._is_waiting:
            raise LinuxError(
                f"cannot {wish} now: the guest is being waited for, and this is a callback of that "
                "wait, or another thread; do it afterwards"
            )

    def _wait(self, done: Callable[[], bool], awaited: str, limits: Limits) -> None:
        while not done():
            left = limits.wall_ends_s - time.monotonic()
            if left <= 0:
                raise self._timeout(awaited, f"{limits.wall_s:g} s")
            span = left if self.on_slice is None else min(left, SLICE_S)
            stop = self.vm.go(
                until=done, deadline_ns=limits.guest_ends_ns, wall_seconds=span, reboot=False
            )
            if self.on_slice is not None:
                self.on_slice()
            match stop.kind:
                case StopKind.UNTIL | StopKind.WALL:
                    pass
                case StopKind.DEADLINE if not done():
                    raise self._timeout(awaited, f"{limits.guest_s:g} s of guest time")
                case StopKind.DEADLINE:
                    pass
                case _:
                    how = ending(stop, self.console_text)
                    line = f"the guest ended ({how}) before {awaited} came"
                    raise GuestStopped(line, stop, self.last_words(stop))

    def _timeout(self, awaited: str, limit: str) -> GuestTimeout:
        line = f"{awaited} did not come within {limit}"
        if why := reason(self.console_text):
            line += f"; the guest said: {why}"
        elif not self.state.heard:
            line += f"; {NOTHING_PRINTED}"
        return GuestTimeout(line, last_lines(self.console_text) if self.state.heard else "")

    def last_words(self, stop: Stop) -> str:
        """What helps to find out why a guest ended: nothing after a power-off."""
        if stop.kind in (StopKind.POWEROFF, StopKind.DEBUG_EXIT):
            return ""
        state = self.state_in_words(stop)
        return f"{last_lines(self.console_text)}\n--- the state ---\n{state}"

    def state_in_words(self, stop: Stop) -> str:
        """The decoded state in which the guest ended."""
        return stop.detail.partition("\n")[2] or self.vm.describe()

    def _hear(self, data: bytes) -> None:
        heard = self.state.heard
        heard += data
        if len(heard) > 2 * CONSOLE_KEPT_BYTES:
            del heard[:-CONSOLE_KEPT_BYTES]


def _keep(kept: bytearray, data: bytes, *, is_taken: bool) -> None:
    """What a guest prints is bounded, and nothing is left out unsaid."""
    kept += data
    if is_taken and len(kept) > 2 * CONSOLE_KEPT_BYTES:
        del kept[:-CONSOLE_KEPT_BYTES]
    elif len(kept) > OUTPUT_KEPT_BYTES:
        raise LinuxError(
            f"the command has printed more than {OUTPUT_KEPT_BYTES >> 20} MiB: "
            "take its output as it comes, with on_output"
        )
