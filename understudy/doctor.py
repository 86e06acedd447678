"""What this computer offers to understudy, in words.

What: looks at the processor, KVM, memory, the package client and the tools for developers.
Source: proc(5), getrlimit(2); KVM's own interface, of which only the existence is asked.
Invariants: changes nothing, needs no root, never raises because something is missing.
"""

import mmap
import os
import platform
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

WINDOW_BYTES: Final = 3 * (4 << 40) + 5 * (64 << 30) + (64 << 20)
"""Addresses of a 64-bit program's window (silicon/src/mmu/window.rs): three arenas and guards."""
WINDOW_MAPPINGS: Final = 2 * 30_000
"""Mappings that the pages of all windows of a process may take."""
OTHER_BYTES: Final = 4 << 30
"""Addresses that are left for all else: the process itself, a guest's memory, its code."""
OTHER_MAPPINGS: Final = 5_000


class Level(Enum):
    """How much a finding matters."""

    GOOD = "good"
    LACK = "lack"  # something that one can do without
    BAD = "bad"  # guests cannot run


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, what was found, what to do about it."""

    topic: str
    level: Level
    words: str
    advice: str = ""


@dataclass(frozen=True)
class Computer:
    """Where to look; the tests put another computer's files here."""

    root: Path = Path("/")
    which: Callable[[str], str | None] = shutil.which
    machine: str = field(default_factory=platform.machine)
    system: str = field(default_factory=platform.system)
    address_bytes: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_AS)[0])
    """How many bytes of addresses a process may have; -1: any number."""

    def text(self, path: str) -> str:
        """The text of a file below the root; empty if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def cpuinfo(self) -> dict[str, str]:
        """The first processor's lines of /proc/cpuinfo."""
        first = self.text("proc/cpuinfo").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def examine(computer: Computer | None = None) -> list[Finding]:
    """Everything that `understudy doctor` reports, in the order of importance."""
    here = computer or Computer()
    return [
        _system(here),
        _processor(here),
        _machine(),
        _memory(here),
        _memfd(),
        _generated_code(),
        _windows(here),
        _hardware_assist(here),
        _package_client(here),
        *_developer(here),
    ]


def _system(here: Computer) -> Finding:
    if here.system == "Linux" and here.machine == "x86_64":
        return Finding("system", Level.GOOD, "Linux on x86-64")
    return Finding(
        "system",
        Level.BAD,
        f"{here.system} on {here.machine}",
        "understudy runs x86 guests on x86-64 Linux computers only",
    )


def _processor(here: Computer) -> Finding:
    info = here.cpuinfo()
    name = info.get("model name", "unknown model")
    vendor = info.get("vendor_id", "unknown vendor")
    count = here.text("proc/cpuinfo").count("processor\t:")
    return Finding("processor", Level.GOOD, f"{name} ({vendor}), {count} logical processors")


def _machine() -> Finding:
    """The compiled half: is it there, and which of the host's features can it use?"""
    try:
        from understudy import silicon
    except ImportError as error:
        return Finding(
            "machine (compiled half)",
            Level.BAD,
            f"cannot be loaded: {error}",
            "in a clone of the repository: make setup; otherwise reinstall the wheel",
        )
    features = silicon.host_features()
    used = ", ".join(sorted(name for name, there in features.items() if there)) or "none"
    lacking = ", ".join(sorted(name for name, there in features.items() if not there))
    words = f"loaded; of this processor's features the engine can use: {used}"
    return Finding(
        "machine (compiled half)", Level.GOOD, words + (f"; not there: {lacking}" * bool(lacking))
    )


def _memory(here: Computer) -> Finding:
    for line in here.text("proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) // 1024
            break
    else:
        return Finding("memory", Level.LACK, "cannot tell how much is free (/proc/meminfo)")
    words = f"{available} MB free; a guest costs only what it touches, not what it is given"
    if available < 512:
        return Finding("memory", Level.LACK, words, "give guests little: --memory 128M")
    return Finding("memory", Level.GOOD, words)


def _memfd() -> Finding:
    try:
        fd = os.memfd_create("understudy-doctor")
        try:
            os.ftruncate(fd, 1 << 32)
        finally:
            os.close(fd)
    except (OSError, AttributeError) as error:
        return Finding(
            "memfd",
            Level.BAD,
            f"the kernel gives no sparse memory files ({error})",
            "a limit on file size (ulimit -f) or a sandbox forbids memfd_create; lift it",
        )
    return Finding("memfd", Level.GOOD, "sparse memory files work")


def _generated_code() -> Finding:
    """The engine writes code and runs it; some sandboxes forbid that."""
    try:
        mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError as error:
        return Finding(
            "generated code",
            Level.LACK,
            f"this process may not map executable memory ({error.strerror})",
            "only --engine reference will run; allow execmem in the sandbox's policy",
        )
    return Finding("generated code", Level.GOOD, "allowed")


def _windows(here: Computer) -> Finding:
    """Guests' programs run at half the speed where their windows find no addresses or mappings."""
    topic, needed, limit = "windows", WINDOW_BYTES + OTHER_BYTES, here.address_bytes
    if limit != resource.RLIM_INFINITY and limit < needed:
        return Finding(
            topic,
            Level.LACK,
            f"ulimit -v is {limit >> 10} KiB: a guest's 64-bit programs run at about half the "
            f"speed, without windows, which take {needed >> 10} KiB of addresses (not of memory)",
            "lift it before the start: ulimit -v unlimited",
        )
    mappings = here.text("proc/sys/vm/max_map_count").strip()
    if mappings.isdigit() and int(mappings) < WINDOW_MAPPINGS + OTHER_MAPPINGS:
        return Finding(
            topic,
            Level.LACK,
            f"vm.max_map_count is {mappings}: the windows of guests' programs may take "
            f"{WINDOW_MAPPINGS} mappings of a process",
            "as root: sysctl vm.max_map_count=65530",
        )
    return Finding(topic, Level.GOOD, "programs find addresses and mappings enough for theirs")


def _hardware_assist(here: Computer) -> Finding:
    """KVM is worth something only with VT-x or AMD-V behind it; the flags tell, not the device."""
    flags = here.cpuinfo().get("flags", "").split()
    assist = "VT-x (vmx)" if "vmx" in flags else "AMD-V (svm)" if "svm" in flags else ""
    device = here.root / "dev/kvm"
    topic = "hardware assist"
    if not assist and device.exists():
        return Finding(
            topic,
            Level.LACK,
            "/dev/kvm is there, but neither vmx nor svm is among the processor's flags: nothing "
            "stands behind it (it would run at about 1 MIPS), so it is not used",
            "nothing to do: understudy brings its own machine",
        )
    if not assist:
        return Finding(
            topic,
            Level.LACK,
            "none (no vmx or svm flag, no /dev/kvm)",
            "nothing to do: understudy brings its own machine",
        )
    if not device.exists():
        return Finding(topic, Level.GOOD, f"{assist}, without /dev/kvm; not needed")
    usable = os.access(device, os.R_OK | os.W_OK)
    words = f"{assist}, /dev/kvm {'usable' if usable else 'not open to this user'}"
    return Finding(topic, Level.GOOD, f"{words}; this version does not use it yet")


def _package_client(here: Computer) -> Finding:
    missing = [name for name in ("apt-get", "dpkg-deb") if here.which(name) is None]
    if not missing:
        return Finding("package client", Level.GOOD, "apt-get: `understudy fetch` can get guests")
    return Finding(
        "package client",
        Level.LACK,
        f"{' and '.join(missing)} missing: `understudy fetch` cannot get Debian kernels",
        "use --guest hello, or your own: understudy run --kernel FILE --initrd FILE",
    )


def _developer(here: Computer) -> list[Finding]:
    """What only those need who change, test or measure understudy."""
    tools = (
        ("cargo", "compiling the Rust half", "install Rust"),
        ("cc", "linking the Rust half", "apt-get install gcc libc6-dev"),
        ("nasm", "assembling the guests of the tests", "apt-get install nasm"),
        ("qemu-system-x86_64", "`make bench` (the peer)", "apt-get install qemu-system-x86"),
    )
    findings = [
        Finding(name, Level.GOOD, f"there, for {purpose}")
        if here.which(name)
        else Finding(name, Level.LACK, f"missing; needed only for {purpose}", advice)
        for name, purpose, advice in tools
    ]
    include = Path(sysconfig.get_path("include")) / "Python.h"
    headers = "there" if include.exists() else "missing"
    python = ".".join(str(part) for part in sys.version_info[:3])
    words = f"{python}; its C headers are {headers} (not needed: the wheel is abi3)"
    return [Finding("Python", Level.GOOD, words), *findings]
