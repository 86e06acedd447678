"""Our images on an independent machine: what we load and build runs under QEMU.

Nothing of our own processor or hypervisor takes part, so a failure here is the loader's or the
initramfs's.  Skipped, with the reason, where QEMU or the guests are not to be had.
"""

import contextlib
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests.reset_vector import firmware
from tests.unit.guests.flat_memory import MIB, FlatMemory
from understudy.guests import debian, hello, load
from understudy.guests.entry import GuestError
from understudy.guests.initramfs import PROMPT

QEMU = shutil.which("qemu-system-x86_64")
WALL_SECONDS = 270.0  # a busy computer needs most of it for a boot; below the limit for a test

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")


class Qemu:
    """A QEMU with its console in our hands."""

    def __init__(self, *arguments: str, memory: str = "256") -> None:
        command = [str(QEMU), "-nodefaults", "-no-reboot", "-display", "none", "-m", memory]
        command += ["-chardev", "stdio,id=console", "-serial", "chardev:console"]
        self.process = subprocess.Popen(
            command + list(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.seen = b""
        self.deadline = time.monotonic() + WALL_SECONDS

    def step(self) -> None:
        """Wait for some output and keep it."""
        assert self.process.stdout is not None
        left = self.deadline - time.monotonic()
        assert left > 0, f"no end in sight; console so far:\n{self.seen.decode(errors='replace')}"
        ready, _, _ = select.select([self.process.stdout], [], [], left)
        if self.process.stdout in ready:
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"QEMU has ended; console:\n{self.seen.decode(errors='replace')}"
            self.seen += data

    def until(self, text: bytes) -> bytes:
        """Run until the console shows `text`; returns what came before and drops both."""
        while text not in self.seen:
            self.step()
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()


@contextlib.contextmanager
def qemu(*arguments: str, memory: str = "256") -> Iterator[Qemu]:
    machine = Qemu(*arguments, memory=memory)
    try:
        yield machine
    finally:
        machine.process.kill()
        machine.process.communicate()


def guest(name: str) -> debian.Guest:
    try:
        return debian.fetch(name)
    except GuestError as error:
        pytest.skip(f"the guest {name} cannot be had: {error}")


def loaded(folder: Path, memory: FlatMemory, kernel: bytes | Path, **options: object) -> list[str]:
    """Load with our loader; QEMU arguments that start that memory in that state."""
    entry = load(memory, kernel, **options)  # type: ignore[arg-type]
    (folder / "rom").write_bytes(firmware(entry))
    (folder / "low").write_bytes(memory.content[:0xA_0000])
    (folder / "high").write_bytes(memory.content[MIB:])
    return [
        "-bios",
        str(folder / "rom"),
        "-device",
        f"loader,file={folder / 'low'},addr=0,force-raw=on",
        "-device",
        f"loader,file={folder / 'high'},addr={MIB},force-raw=on",
    ]


def test_initramfs() -> None:
    linux = guest("cloud-amd64")
    arguments = ["-kernel", str(linux.kernel), "-initrd", str(linux.initrd)]
    with qemu(*arguments, "-append", linux.append + " quiet") as machine:
        machine.until(PROMPT)
        machine.type(b"sh -c 'echo begun; exec sleep 1000'\n")  # in the foreground when it speaks
        machine.until(b"begun\r\n")
        machine.type(b"\x03")  # job control: Ctrl-C reaches the program in the foreground
        machine.until(PROMPT)
        machine.type(b"echo status $?\n")
        machine.until(b"status 130")
        machine.until(PROMPT)
        machine.type(b"poweroff\n")
        machine.until(b"Power down")
        assert machine.process.wait(30) == 0


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cloud-amd64", "linux-direct"),
        ("cloud-amd64", "pvh"),
        ("cloud-amd64-6.12", "linux-direct"),
        ("cloud-amd64-6.12", "pvh"),
        ("686", "linux-direct"),
        ("686-pae", "pvh"),
    ],
)
def test_loaded_linux_reaches_its_prompt(tmp_path: Path, name: str, method: str) -> None:
    linux = guest(name)
    arguments = loaded(
        tmp_path,
        FlatMemory(),
        linux.kernel,
        initrd=linux.initrd,
        append=linux.append + " quiet acpi=off",
        method=method,
    )
    with qemu(*arguments) as machine:
        machine.until(PROMPT)
        machine.type(b"cat /proc/cmdline\n")
        machine.until(b"quiet acpi=off\r\n")


@pytest.mark.parametrize("method", ["linux-64", "linux-32"])
def test_kernel_decompresses_itself(tmp_path: Path, method: str) -> None:
    linux = guest("cloud-amd64")
    arguments = loaded(
        tmp_path,
        FlatMemory(),
        linux.kernel,
        append="console=ttyS0 earlyprintk=ttyS0 acpi=off",
        method=method,
    )
    with qemu(*arguments) as machine:
        machine.until(b"Linux version 6.1.")


def test_memtest_starts(tmp_path: Path) -> None:
    memtest = guest("memtest86+")
    arguments = loaded(tmp_path, FlatMemory(), memtest.kernel, append=memtest.append)
    with qemu(*arguments) as machine:
        machine.until(b"Memtest86+")


def test_hello_prints_its_line(tmp_path: Path) -> None:
    with qemu(*loaded(tmp_path, FlatMemory(16 * MIB), hello.image()), memory="16") as machine:
        machine.until(hello.MESSAGE)
