"""A virtual machine as its users meet it: `with VM.linux("cloud-amd64") as vm: vm.run("uname -a")`.

What: boots a guest, waits for its prompt, types into its console, runs commands in it.
Source: none; commands travel by the agent of `understudy.guests.agent`, on the second serial port.
Invariants: each wait ends, by a limit in guest time, one in wall time, or the guest's own end, and
says which.  A VM belongs to one thread at a time; several VMs run at once on several threads.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from understudy import vm as machine
from understudy.config import Config
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import debian, loader
from understudy.guests import packages as debian_packages
from understudy.guests.agent import Agent, Exited, Output, Send
from understudy.guests.apt import Progress
from understudy.guests.entry import GuestError
from understudy.machine.host import Host
from understudy.verdict import Stop, StopKind

# How much of what the console showed is kept; a guest may print for ever.
CONSOLE_KEPT_BYTES = 1 << 20
# The shell prompts of busybox and of most others, at the end of what was printed.
PROMPT = rb"[#$] (?:\x1b\[6n)?\Z"

BOOT_GUEST_S = 300.0
BOOT_WALL_S = 600.0
COMMAND_GUEST_S = 600.0
COMMAND_WALL_S = 600.0
SEED_BYTES = 32

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


class VM(machine.VM):
    """A virtual machine, and what one does with a Linux in it.

    >>> with VM.linux("cloud-amd64", memory="256M") as vm:  # doctest: +SKIP
    ...     vm.run("uname -s").output
    'Linux\\n'
    """

    _heard: bytearray
    _agent: Agent
    _command_output: bytearray
    _on_command_output: Callable[[bytes], None] | None
    _command_status: int | None
    on_slice: Callable[[], None] | None

    @classmethod
    def linux(
        cls,
        guest: str | Path = "cloud-amd64",
        *,
        initrd: str | Path | None = None,
        append: str = "",
        host: Host | None = None,
        packages: Sequence[str] = (),
        progress: Progress | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> Self:
        """Make a VM with `guest` loaded, ready to run.

        `guest` is a name that `understudy fetch --list` shows (fetched first if it is not in the
        cache; `progress` is told about that), or the path of a kernel.  `append` is added to the
        kernel's command line.  `packages` are Debian's, by name: they and what they depend on are
        unpacked into the guest's file system (fetched like the guest).  The rest is as for `VM`:
        a `config`, or its fields, such as `memory="1G"`.
        """
        if config is None:
            options.setdefault("name", str(guest))
        config = Config.of(config, **options)
        machine.check_names(config)
        kernel: Path | bytes
        ramdisk: Path | None = Path(initrd) if initrd is not None else None
        if isinstance(guest, Path):
            if packages:
                raise GuestError("packages go with a guest by name, not with a kernel file")
            kernel = guest
        else:
            fetched = debian.fetch(guest, progress or _say_nothing)
            kernel, ramdisk = fetched.kernel, ramdisk or fetched.initrd
            append = f"{fetched.append} {append}".strip()
            if packages:
                ramdisk = _with_packages(guest, ramdisk, packages, progress or _say_nothing)
        vm = cls(config, host=host)
        try:
            vm.listen()
            # In virtual time two runs are the same run, with the same random numbers.
            is_wall = config.clock == "wall"
            seed = os.urandom(SEED_BYTES) if is_wall else bytes(range(1, SEED_BYTES + 1))
            entry = loader.load(
                vm.memory, kernel, initrd=ramdisk, append=append, rsdp=RSDP_GPA, seed=seed
            )
            vm.enter(entry)
        except BaseException:
            vm.close()
            raise
        return vm

    def listen(self) -> None:
        """Begin to keep what the guest prints and to talk with its agent."""
        self._heard, self._command_output = bytearray(), bytearray()
        self._agent = Agent()
        self._command_status, self._on_command_output, self.on_slice = None, None, None
        self.console.on_output.append(self._hear)
        self.agent_port.on_output.append(self._hear_agent)

    # --- The console ------------------------------------------------------------------------

    @property
    def console_text(self) -> str:
        """What the guest has printed on its console (the last megabyte of it)."""
        return self._heard.decode("utf-8", "replace").replace("\r\n", "\n")

    def send(self, text: str | bytes) -> None:
        """Type into the console; a line ends with "\\n"."""
        self.console.send(text.encode() if isinstance(text, str) else text)

    def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest how large the window is that shows its console; does not wait for it.

        Nothing happens in a guest without the agent, or while another command is under way.
        """
        if not self._agent.busy:
            command = f"stty -F /dev/ttyS0 rows {rows} cols {columns}"
            self.agent_port.send(self._agent.request(command))

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
            return pattern.search(bytes(self._heard[-256:])) is not None

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
        self.run_until(lambda: wanted in self._heard, repr(text), timeout_guest_s, timeout_wall_s)

    # --- Commands ---------------------------------------------------------------------------

    def wait_for_agent(
        self, *, timeout_guest_s: float = BOOT_GUEST_S, timeout_wall_s: float = BOOT_WALL_S
    ) -> None:
        """Run until the guest takes commands: its user land is up."""
        self.run_until(
            lambda: self._agent.ready,
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

        `on_output` gets the output as it comes.  A command that is not done in time is given up
        (it goes on in the guest) and GuestTimeout is raised.
        """
        if not self._agent.ready:
            self.wait_for_agent()
        if self._agent.busy:  # with the size of the window
            self.run_until(
                lambda: not self._agent.busy, "an answer", timeout_guest_s, timeout_wall_s
            )
        self._command_output.clear()
        self._command_status, self._on_command_output = None, on_output
        self.agent_port.send(self._agent.request(command))
        try:
            self.run_until(
                lambda: self._command_status is not None,
                f"the end of {command!r}",
                timeout_guest_s,
                timeout_wall_s,
            )
        except LinuxError:
            self._agent.give_up()
            raise
        raw, status = bytes(self._command_output), self._command_status
        assert status is not None
        return Result(raw.decode("utf-8", "replace"), status, raw)

    def power_off(self, *, timeout_guest_s: float = 60.0, timeout_wall_s: float = 120.0) -> None:
        """Ask the guest to power itself off, and wait until it has."""
        if not self._agent.ready:
            self.wait_for_agent()
        self.agent_port.send(self._agent.request("poweroff -f"))
        try:
            self.run_until(lambda: False, "the power-off", timeout_guest_s, timeout_wall_s)
        except GuestStopped as stopped:
            if stopped.stop.kind != StopKind.POWEROFF:
                raise

    # --- Running ----------------------------------------------------------------------------

    def run_until(
        self,
        done: Callable[[], bool],
        awaited: str,
        timeout_guest_s: float,
        timeout_wall_s: float,
    ) -> None:
        """Run until `done()`; GuestTimeout or GuestStopped says that `awaited` did not come."""
        deadline_ns = self.clock.now() + round(timeout_guest_s * _NS)
        ends_at = time.monotonic() + timeout_wall_s
        while not done():
            left = ends_at - time.monotonic()
            if left <= 0:
                raise GuestTimeout(f"{awaited} did not come within {timeout_wall_s:g} s")
            span = left if self.on_slice is None else min(left, SLICE_S)
            stop = self.go(until=done, deadline_ns=deadline_ns, wall_seconds=span)
            if self.on_slice is not None:
                self.on_slice()
            if stop.kind == StopKind.DEADLINE and not done():
                limit = f"{timeout_guest_s:g} s of guest time"
                raise GuestTimeout(f"{awaited} did not come within {limit}")
            if stop.kind not in (StopKind.UNTIL, StopKind.WALL, StopKind.DEADLINE):
                line = f"the guest ended ({stop_in_words(stop)}) before {awaited} came"
                raise GuestStopped(line, stop, self.last_words(stop))

    def last_words(self, stop: Stop) -> str:
        """What helps to find out why a guest ended: nothing after a power-off."""
        if stop.kind in (StopKind.POWEROFF, StopKind.DEBUG_EXIT):
            return ""
        tail = "\n".join(self.console_text.splitlines()[-12:])
        state = self.state_in_words(stop)
        return f"--- the console's last lines ---\n{tail}\n--- the state ---\n{state}"

    def state_in_words(self, stop: Stop) -> str:
        """The decoded state in which the guest ended."""
        return stop.detail.partition("\n")[2] or self.describe()

    def _hear(self, data: bytes) -> None:
        self._heard += data
        if len(self._heard) > 2 * CONSOLE_KEPT_BYTES:
            del self._heard[:-CONSOLE_KEPT_BYTES]

    def _hear_agent(self, data: bytes) -> None:
        for event in self._agent.feed(data):
            match event:
                case Send(reply):
                    self.agent_port.send(reply)
                case Output(chunk):
                    self._command_output += chunk
                    if self._on_command_output is not None:
                        self._on_command_output(chunk)
                case Exited(status):
                    self._command_status = status


def _with_packages(
    guest: str, ramdisk: Path | None, names: Sequence[str], progress: Progress
) -> Path:
    """The guest's RAM disk with Debian packages in it."""
    if ramdisk is None:
        raise GuestError(f"{guest} has no file system to unpack packages into: choose a Linux")
    architecture = debian.PACKAGES[guest].architecture
    return debian_packages.with_packages(ramdisk, names, progress, architecture=architecture)


def _say_nothing(_text: str, _share: float | None) -> None:
    """For those who want no progress."""


_WORDS = {
    StopKind.POWEROFF: "it powered itself off",
    StopKind.RESET: "it asked for a reset, which understudy does not carry out",
    StopKind.TRIPLE_FAULT: "a triple fault, it could not deliver an exception",
    StopKind.STUCK: "halted, and nothing can wake it",
    StopKind.STOPPED: "somebody stopped it",
    StopKind.DEBUG_EXIT: "it asked to end through the debug-exit port",
    StopKind.ERROR: "understudy cannot go on with it",
}


def stop_in_words(stop: Stop) -> str:
    """How a guest ended, in one line."""
    words = _WORDS.get(stop.kind, stop.kind)
    detail = stop.detail.partition("\n")[0]
    return f"{words}: {detail}" if detail and stop.kind != StopKind.POWEROFF else words
