"""A session with the Linux in a VM: its console, and commands that run in it.

    session = Linux(machine.VM.restore(data))
    session.run("uname -a")

Source: none; commands travel by the port of `understudy.devices.agent`.
Invariants: each wait ends, by a limit in guest time, one in wall time, or the guest's own end, and
says which; however it ends (a callback's exception and Ctrl-C are ways, too), the next one works.
The session's state goes with the VM's snapshots.
"""

import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from understudy import vm as machine
from understudy.devices.agent import Agent
from understudy.last_words import NOTHING_PRINTED, ending, last_lines, reason
from understudy.state import plain, restore
from understudy.verdict import Stop, StopKind

# How much of what the console showed is kept; a guest may print for ever.
CONSOLE_KEPT_BYTES = 1 << 20
# How much a command may print that nobody takes as it comes; of what is taken, a megabyte is kept.
OUTPUT_KEPT_BYTES = 1 << 26
# The shell prompts of busybox and of most others, at the end of what was printed.
PROMPT = rb"[#$] (?:\x1b\[6n)?\Z"

BOOT_GUEST_S = 300.0
BOOT_WALL_S = 600.0
COMMAND_GUEST_S = 600.0
COMMAND_WALL_S = 600.0

_NS = 1_000_000_000
SLICE_S = 0.25  # `on_slice` is called this often


class LinuxError(RuntimeError):
    """A guest did not do what it was asked to.  `detail` holds its decoded state, if that helps."""

    def __init__(self, line: str, detail: str = "") -> None:
        super().__init__(line)
        self.detail = detail


class GuestTimeout(LinuxError):
    """A limit passed, of guest time or of wall time; the guest is as it was and can go on."""


class GuestStopped(LinuxError):
    """The guest ended while something was expected of it; `stop` says how."""

    def __init__(self, line: str, stop: Stop, detail: str = "") -> None:
        super().__init__(line, detail)
        self.stop = stop


@dataclass(frozen=True)
class Result:
    """What a command printed, standard output and error together, and the status it ended with.

    `output` is `raw` read as UTF-8.
    """

    output: str
    status: int
    raw: bytes

    def check(self) -> Self:
        """Itself if the command succeeded; raises LinuxError if not."""
        if self.status != 0:
            raise LinuxError(f"the command ended with status {self.status}", self.output)
        return self


@dataclass
class LinuxState:
    """What a snapshot keeps of a session."""

    heard: bytearray = field(default_factory=bytearray)  # the end of what the console showed
    output: bytearray = field(default_factory=bytearray)  # of the command under way
    status: int | None = None  # of the last command, once it has ended


class Linux:
    """A session with the Linux in a VM.

    >>> with machine.VM.restore(data) as vm:  # doctest: +SKIP
    ...     Linux(vm).run("uname -s").output
    'Linux\\n'
    """

    def __init__(self, vm: machine.VM) -> None:
        self.vm, self.state = vm, LinuxState()
        self.on_slice: Callable[[], None] | None = None
        self._on_output: Callable[[bytes], None] | None = None
        self._is_waiting = False
        vm.console.on_output.append(self._hear)
        self._agent.on_output.append(self._hear_output)
        self._agent.on_exit.append(self._hear_exit)
        vm.sessions.attach("linux", self)

    def save(self) -> dict[str, Any]:
        """All that a snapshot must keep, as plain values."""
        saved: dict[str, Any] = plain(self.state)
        return saved

    def load(self, saved: dict[str, Any]) -> None:
        """Go on where the saved session was; a command under way is nobody's any more."""
        self.state = restore(LinuxState, saved, "Linux")
        self._agent.give_up()

    def let_go(self) -> None:
        """The VM is closed: what was heard stays, and nothing holds the VM any more."""
        self.vm = weakref.proxy(self.vm)

    @property
    def _agent(self) -> Agent:
        return self.vm.pc.agent

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

        Nothing happens in a guest without the agent, or while another command is under way.
        """
        if self._agent.is_there and not self._agent.is_busy:
            self._agent.request(b"stty -F /dev/ttyS0 rows %d cols %d" % (rows, columns))

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
            lambda: self._agent.is_there,
            "understudy's agent (an initrd of one's own has none)",
            timeout_guest_s,
            timeout_wall_s,
        )

    def run(
        self,
        command: str,
        *,
        timeout_guest_s: float = COMMAND_GUEST_S,
        timeout_wall_s: float = COMMAND_WALL_S,
        on_output: Callable[[bytes], None] | None = None,
    ) -> Result:
        """Run a shell command in the guest and wait for its end; boots first if need be.

        `on_output` gets the output as it comes, and the result has its last megabyte.  LinuxError
        if a command prints more than 64 MiB that nobody takes so.  A command that is not done in
        time is given up (it goes on in the guest until the next one begins) and GuestTimeout is
        raised; so is one whose wait ends by Ctrl-C, or by an exception of `on_output`, which is
        raised here.
        """
        state, agent = self.state, self._agent
        if not agent.is_there:
            self.wait_for_agent()
        if agent.is_busy and not self._is_waiting:  # with the size of the window
            self.run_until(lambda: not agent.is_busy, "an answer", timeout_guest_s, timeout_wall_s)
        self._refuse_if_waiting(f"run {command!r}")
        state.output.clear()
        state.status, self._on_output = None, on_output
        agent.request(command.encode("utf-8", "surrogateescape"))
        try:
            self.run_until(
                lambda: state.status is not None,
                f"the end of {command!r}",
                timeout_guest_s,
                timeout_wall_s,
            )
        except BaseException:
            agent.give_up()
            raise
        finally:
            self._on_output = None
        raw, status = bytes(state.output), state.status
        assert status is not None
        return Result(raw.decode("utf-8", "replace"), status, raw)

    def power_off(self, *, timeout_guest_s: float = 60.0, timeout_wall_s: float = 120.0) -> None:
        """Ask the guest to power itself off, and wait until it has."""
        agent = self._agent
        if not agent.is_there:
            self.wait_for_agent()
        self._refuse_if_waiting("power off")
        agent.give_up()
        agent.request(b"poweroff -f")
        try:
            self.run_until(lambda: False, "the power-off", timeout_guest_s, timeout_wall_s)
        except GuestStopped as stopped:
            if stopped.stop.kind is not StopKind.POWEROFF:
                raise
        finally:
            agent.give_up()

    # --- Running ----------------------------------------------------------------------------

    def run_until(
        self,
        done: Callable[[], bool],
        awaited: str,
        timeout_guest_s: float,
        timeout_wall_s: float,
    ) -> None:
        """Run until `done()`; GuestTimeout or GuestStopped says that `awaited` did not come."""
        self._refuse_if_waiting(f"wait for {awaited}")
        if self.vm.is_closed:
            raise RuntimeError(f"{self.vm.name} is closed")
        self._is_waiting = True
        try:
            self._wait(done, awaited, timeout_guest_s, timeout_wall_s)
        finally:
            self._is_waiting = False

    def _refuse_if_waiting(self, wish: str) -> None:
        if self._is_waiting:
            raise LinuxError(
                f"cannot {wish} now: the guest is being waited for, and this is a callback of that "
                "wait, or another thread; do it afterwards"
            )

    def _wait(
        self,
        done: Callable[[], bool],
        awaited: str,
        timeout_guest_s: float,
        timeout_wall_s: float,
    ) -> None:
        deadline_ns = self.vm.clock.now() + round(timeout_guest_s * _NS)
        ends_at = time.monotonic() + timeout_wall_s
        while not done():
            left = ends_at - time.monotonic()
            if left <= 0:
                raise self._timeout(awaited, f"{timeout_wall_s:g} s")
            span = left if self.on_slice is None else min(left, SLICE_S)
            stop = self.vm.go(until=done, deadline_ns=deadline_ns, wall_seconds=span, reboot=False)
            if self.on_slice is not None:
                self.on_slice()
            match stop.kind:
                case StopKind.UNTIL | StopKind.WALL:
                    pass
                case StopKind.DEADLINE if not done():
                    raise self._timeout(awaited, f"{timeout_guest_s:g} s of guest time")
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

    def _hear_output(self, data: bytes) -> None:
        self._keep(data)
        if self._on_output is not None:
            self._tell(self._on_output, data)

    def _hear_exit(self, status: int) -> None:
        self.state.status = status

    def _keep(self, chunk: bytes) -> None:
        """What a guest prints is bounded, and nothing is left out unsaid."""
        output = self.state.output
        output += chunk
        if self._on_output is not None and len(output) > 2 * CONSOLE_KEPT_BYTES:
            del output[:-CONSOLE_KEPT_BYTES]
        elif len(output) > OUTPUT_KEPT_BYTES:
            output.clear()
            self._agent.give_up()
            self.vm.fail(LinuxError(
                f"the command has printed more than {OUTPUT_KEPT_BYTES >> 20} MiB: "
                "take its output as it comes, with on_output"
            ))  # fmt: skip

    def _tell(self, listener: Callable[[bytes], None], chunk: bytes) -> None:
        try:
            listener(chunk)
        except Exception as problem:  # the wait raises it, when the guest's access is done
            self._on_output = None
            self.vm.fail(problem)
