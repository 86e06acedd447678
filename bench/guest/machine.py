"""A guest whose console is spoken with, the same way wherever it runs: QEMU's, and understudy's.

Source: qemu-system(1), "-netdev stream"; passt(1).
Invariants: time is the host's, taken when a mark arrives at the console; whatever goes wrong is
`Failed`, with the last that was heard.
"""

import os
import select
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from bench.markers import Failed, Markers

LOGIN, PROMPT = b"debian login: ", b"root@debian:~# "
TEXT_BYTES: Final = 4096  # of what was heard, to be looked at
BOOT_SECONDS: Final = 600.0
ASK_SECONDS: Final = 120.0
SHELL: Final = "exec env PS1= PS2= sh"  # one that draws nothing of what is typed
QUIET: Final = "stty -echo; dmesg -n 1; mkdir -p /run/bench; cd /run/bench"


class Machine(ABC):
    """A guest that was started.  `began` is when."""

    def __init__(self, log: Path) -> None:
        self.text, self.markers, self.log = b"", Markers(), log.open("wb", 0)
        self.began = time.perf_counter()

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Type this."""

    @abstractmethod
    def until(self, is_done: Callable[[], bool], timeout: float) -> None:
        """Have it run until then; `Failed` if it ends before, or when the time is over."""

    def close(self) -> None:
        """End it."""
        self.log.close()

    def hear(self, data: bytes) -> None:
        """The console has said this."""
        self.log.write(data)
        self.text = (self.text + data)[-TEXT_BYTES:]
        self.markers.feed(data, time.perf_counter())

    # --- what is said ---

    def boot(self) -> float:
        """Until somebody may log in; the seconds since it was started."""
        self._wait(LOGIN, BOOT_SECONDS)
        return time.perf_counter() - self.began

    def log_in(self) -> None:
        """From there to a shell that prints what it is asked for, and nothing else."""
        self._say("root", PROMPT)
        self._say(SHELL, b"")
        self._say(f"{QUIET}; echo; echo R", b"")
        self.until(lambda: self.markers.ready is not None, ASK_SECONDS)

    def run(self, line: str, timeout: float) -> float:
        """A line of shell; how many seconds it took.  `Failed` if its status is not 0."""
        self.markers = Markers()
        self.send(
            f"echo S; {{ {line}; }} >out 2>&1 </dev/null; s=$?; echo E 0; "
            "[ $s = 0 ] || tail -n 3 out; echo X $s\n".encode()
        )
        self.until(lambda: self.markers.status is not None, timeout)
        return self.markers.sample().seconds

    def _say(self, line: str, answer: bytes) -> None:
        self.markers = Markers()
        self.send(line.encode() + b"\n")
        if answer:
            self._wait(answer, ASK_SECONDS)

    def _wait(self, words: bytes, timeout: float) -> None:
        self.until(lambda: words in self.text, timeout)
        self.text = b""

    def heard(self) -> str:
        """The last lines, for a message."""
        lines = self.text.decode(errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines[-4:] if line.strip())


class Qemu(Machine):
    """One under QEMU, its console at its standard input and output."""

    def __init__(self, log: Path, command: list[str], files: tuple[int, ...]) -> None:
        """`files`: open ones that it gets."""
        super().__init__(log)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=files
        )

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def until(self, is_done: Callable[[], bool], timeout: float) -> None:
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.perf_counter() + timeout
        while not is_done():
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise Failed(f"not done in {timeout:g} s; it said: {self.heard()}")
            data = os.read(fd, 1 << 16)
            if not data:
                status = self.process.wait()
                raise Failed(f"QEMU ended with status {status}; the guest said: {self.heard()}")
            self.hear(data)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        super().close()


class Own(Machine):
    """One under understudy; `make` gives the VM, and the clock runs while it does."""

    def __init__(self, log: Path, make: Callable[[], Any]) -> None:
        super().__init__(log)
        try:
            self.vm = make()
        except (RuntimeError, ValueError, OSError) as error:
            self.log.close()
            raise Failed(f"the guest could not be made: {error}") from error
        self.vm.console.on_output.append(self.hear)

    def send(self, data: bytes) -> None:
        self.vm.console.send(data)

    def until(self, is_done: Callable[[], bool], timeout: float) -> None:
        try:
            stop = self.vm.go(until=is_done, wall_seconds=timeout)
        except (RuntimeError, ValueError, OSError) as error:
            raise Failed(f"the hypervisor gave up: {error}") from error
        if not is_done():
            raise Failed(f"the guest stopped: {stop.kind} ({stop.detail}); {self.heard()}")

    def close(self) -> None:
        self.vm.close()
        super().close()
