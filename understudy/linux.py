"""A virtual machine as its users meet it: `with VM.linux("cloud-amd64") as vm: vm.run("uname -a")`.

What: boots a guest, waits for its prompt, types into its console, runs commands in it.
Source: none; commands travel by the agent of `understudy.guests.agent`, on the second serial port.
Invariants: each wait ends, by a limit in guest time, one in wall time, or the guest's own end, and
says which.  A VM belongs to one thread at a time; several VMs run at once on several threads.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from understudy import vm as machine
from understudy.guests import agent, debian, loader
from understudy.vm import Stop

# How much of what the console showed is kept; a guest may print for ever.
CONSOLE_KEPT_BYTES = 1 << 20
# The shell prompts of busybox and of most others, at the end of what was printed.
PROMPT = rb"[#$] (?:\x1b\[6n)?\Z"

_SLICE_S = 0.2


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
    """What a command in the guest printed (standard output and error together) and its status."""

    output: str
    status: int
    raw: bytes = b""

    def check(self) -> Self:
        """Itself if the command succeeded; raises LinuxError if not."""
        if self.status != 0:
            raise LinuxError(f"the command ended with status {self.status}", self.output)
        return self


class VM(machine.VM):
    """A virtual machine, and what one does with a Linux in it.

    >>> with VM.linux("cloud-amd64", memory="256M") as vm:      # doctest: +SKIP
    ...     vm.wait_for_prompt()
    ...     vm.run("uname -s").output
    'Linux\\n'
    """

    @classmethod
    def linux(
        cls,
        guest: str | Path = "cloud-amd64",
        *,
        memory: str = "256M",
        initrd: str | Path | None = None,
        append: str = "",
        clock: str = "virtual",
        engine: str = "dbt",
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Make a VM with `guest` loaded, ready to run: a name that can be fetched, or a kernel file.

        A named guest that is not in the cache is fetched first.  `append` is added to the kernel's
        command line.  `progress` is told, now and then, what is going on.
        """
        if isinstance(guest, str):
            fetched = debian.fetch(guest, progress=progress)
            kernel, ramdisk = fetched.kernel, fetched.initrd
            append = f"{fetched.append} {append}".strip()
        else:
            kernel, ramdisk = guest, None
        if initrd is not None:
            ramdisk = Path(initrd)
        vm = cls(memory=memory, clock=clock, engine=engine, name=str(guest))
        vm.progress = progress
        vm.enter(loader.load(vm.memory, kernel, initrd=ramdisk, append=append))
        return vm
