"""The three places where a program runs: natively, under QEMU TCG, under understudy.

Each answers one question: how long did this command take between its S and its E line, and what
did it compute?  Both guests get the same kernel, the same initramfs and the same command line, and
are asked over the same kind of line, the second serial port.
"""

import importlib
import os
import select
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from bench.build import Built
from bench.markers import Failed, Markers, Sample
from bench.rows import ENVIRONMENT

# A guest that waits for its turn must not take that for a lock-up.
APPEND = "console=ttyS0 panic=-1 nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
MEMORY = "1G"  # the programs alone are 160 MB, and half of it may be files
BOOT_SECONDS = 120.0


class Subject(ABC):
    """A place where programs run.  `start` may be called again after `stop`."""

    name: str
    boots = True  # whether there is a boot to be measured

    def __init__(self, kernel: Path | None, built: Built, logs: Path) -> None:
        self.kernel, self.built, self.logs = kernel, built, logs

    @abstractmethod
    def version(self) -> str:
        """What runs here, for the report; `Failed` with what to do if it is not available."""

    @abstractmethod
    def start(self, initramfs: Path) -> float:
        """Gets ready to run programs; the seconds until the first line of userland."""

    @abstractmethod
    def run(self, command: list[str], timeout: float) -> Sample:
        """Runs one command (relative to the root directory)."""

    @abstractmethod
    def stop(self) -> None:
        """Ends everything that `start` began."""

    def kernel_file(self) -> Path:
        """The kernel of the guests."""
        if self.kernel is None:
            raise Failed("no kernel: give --kernel FILE, or run `understudy fetch cloud-amd64`")
        return self.kernel


class Native(Subject):
    """The computer itself."""

    name = "native"
    boots = False

    def version(self) -> str:
        return f"{os.uname().sysname} {os.uname().release}"

    def start(self, initramfs: Path) -> float:
        return 0.0

    def run(self, command: list[str], timeout: float) -> Sample:
        markers = Markers()
        with (
            (self.logs / "native.log").open("ab") as log,
            subprocess.Popen(
                command,
                cwd=self.built.root,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                listen(process.stdout.fileno(), markers, timeout)
            except Failed:
                process.kill()
                raise
            markers.status = process.wait()
        return markers.sample()

    def stop(self) -> None:
        pass


class Tcg(Subject):
    """QEMU's own binary translator, one processor, everything it has (`-cpu max`)."""

    name = "tcg"
    process: subprocess.Popen[bytes] | None = None

    def version(self) -> str:
        if shutil.which("qemu-system-x86_64") is None:
            raise Failed("no qemu-system-x86_64 on this computer: install qemu-system-x86")
        answer = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
        )
        return answer.stdout.splitlines()[0]

    def start(self, initramfs: Path) -> float:
        log = self.logs / "tcg-console.log"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", MEMORY]
        command += ["-display", "none", "-monitor", "none", "-no-reboot", "-nodefaults"]
        command += ["-serial", f"file:{log}", "-serial", "stdio"]
        command += ["-kernel", str(self.kernel_file()), "-initrd", str(initramfs)]
        command += ["-append", APPEND]
        begin, markers = time.perf_counter(), Markers()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._listen(markers, BOOT_SECONDS, ready=True)
        assert markers.ready is not None
        return markers.ready - begin

    def run(self, command: list[str], timeout: float) -> Sample:
        self._send(f"run {' '.join(command)}\n".encode())
        markers = Markers()
        self._listen(markers, timeout, ready=False)
        return markers.sample()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.communicate()
        self.process = None

    def _send(self, data: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Failed("QEMU has ended") from error

    def _listen(self, markers: Markers, timeout: float, ready: bool) -> None:
        assert self.process is not None and self.process.stdout is not None
        fd = self.process.stdout.fileno()
        if not listen(fd, markers, timeout, until_ready=ready, until_status=not ready):
            raise Failed(
                f"QEMU ended early, status {self.process.wait()}; see {self.logs}/tcg-console.log"
            )


class Understudy(Subject):
    """understudy through its Python API; nothing outside this class knows that API."""

    name = "understudy"
    vm: Any = None
    log: BinaryIO | None = None

    def version(self) -> str:
        try:
            importlib.import_module("understudy.linux")
        except ImportError as error:
            raise Failed(f"understudy cannot be imported ({error}): run `make build`") from error
        try:
            return f"understudy {metadata.version('understudy')}"
        except metadata.PackageNotFoundError:
            return "understudy from the working tree"

    def start(self, initramfs: Path) -> float:
        linux: Any = importlib.import_module("understudy.linux")
        begin, self.markers = time.perf_counter(), Markers()
        try:
            self.vm = linux.VM.linux(
                self.kernel_file(), initrd=initramfs, append=APPEND, memory=MEMORY, clock="wall"
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise Failed(f"the guest could not be made: {error}") from error
        # Our own first process speaks there, not the agent that VM.linux expects.
        self.vm.com2.on_output[:] = [self._hear]
        self.log = (self.logs / "understudy-console.log").open("wb")
        self.vm.console.on_output.append(self.log.write)
        self._go(BOOT_SECONDS, ready=True)
        assert self.markers.ready is not None
        return self.markers.ready - begin

    def run(self, command: list[str], timeout: float) -> Sample:
        self.markers = Markers()
        self.vm.com2.send(f"run {' '.join(command)}\n".encode())
        self._go(timeout, ready=False)
        return self.markers.sample()

    def stop(self) -> None:
        if self.vm is not None:
            self.vm.close()
        if self.log is not None:
            self.log.close()
        self.vm = self.log = None

    def _hear(self, data: bytes) -> None:
        self.markers.feed(data, time.perf_counter())

    def _go(self, timeout: float, ready: bool) -> None:
        """Runs the guest until it is ready, or until the program's status has come."""

        def done() -> bool:
            return (self.markers.ready if ready else self.markers.status) is not None

        try:
            stop = self.vm.go(until=done, wall_seconds=timeout)
        except (RuntimeError, ValueError, OSError) as error:
            raise Failed(f"the hypervisor gave up: {error}") from error
        if not done():
            heard = f"; last lines: {self.markers.other[-3:]}"
            raise Failed(f"the guest stopped: {stop.kind} ({stop.detail}){heard}")


SUBJECTS: dict[str, type[Subject]] = {kind.name: kind for kind in (Native, Tcg, Understudy)}


def listen(
    fd: int,
    markers: Markers,
    timeout: float,
    until_ready: bool = False,
    until_status: bool = False,
) -> bool:
    """Feeds what arrives on `fd` to `markers`; False at its end, True when what was asked came."""
    deadline = time.perf_counter() + timeout
    while True:
        if (until_ready and markers.ready is not None) or (
            until_status and markers.status is not None
        ):
            return True
        left = deadline - time.perf_counter()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise Failed(f"nothing more within {timeout:g} s; last lines: {markers.other[-3:]}")
        data = os.read(fd, 65536)
        now = time.perf_counter()
        if not data:
            return False
        markers.feed(data, now)
