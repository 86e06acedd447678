"""The kernel's own selftests for x86, built static for 64 and 32 bits, and run in three places.

What: fetches linux-source-6.1 through the computer's package client, builds
tools/testing/selftests/x86 into the cache, runs every program in an understudy guest, under QEMU
TCG with the same kernel and initramfs, and on this computer, and compares how each one ends.
Source: the selftests' own Makefile.  Invariant: one shell script runs them everywhere, so a
difference is one of the processor or of the kernel, not of the way they are started.

`python -m tests.guests.selftests [KERNEL]` prints a table of docs/results/selftests.md; a kernel of
32 bits runs the programs of 32 bits.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.windows import force_windows, window_counts
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import deb, debian, initramfs, loader
from understudy.guests.apt import Apt, Progress
from understudy.guests.cache import Cache, explained
from understudy.guests.entry import GuestError
from understudy.linux import VM

PACKAGE = "linux-source-6.1"
ITEM = "selftests-x86"
TREE = "tools/testing/selftests"
WANTED = (f"{TREE}/x86/", f"{TREE}/lib.mk", f"{TREE}/kselftest", "tools/include/",
          "arch/x86/include/asm/")  # fmt: skip
GUEST = "amd64"  # the cloud kernel has no 16-bit segments
KERNELS = (GUEST, "686", "686-pae")
APPEND = "vsyscall=emulate"  # as on most computers; Debian's kernels choose xonly
MEMORY = "512M"
KEPT_BYTES = 200_000  # of what a program prints: ptrace_syscall can go on without end
SECONDS = 30  # for each program, in its own time
WALL_SECONDS = 900.0

SCRIPT = f"""
for path in *_[36][24]; do
    echo "=== $path"
    rm -f /tmp/selftest.status
    {{ timeout -s KILL {SECONDS} ./$path </dev/null 2>&1; echo $? >/tmp/selftest.status; }} |
        head -c {KEPT_BYTES}
    echo
    echo "=== status $(cat /tmp/selftest.status)"
done
echo "=== end"
"""

INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox ip link set lo up
export PATH=/bin HOME=/root
cd /selftests
stty -F /dev/ttyS1 raw
{{ {SCRIPT} }} >/dev/ttyS1 2>&1
poweroff -f
"""


@dataclass(frozen=True)
class Ending:
    """How a program ended, and its verdict lines: each one's tag, in their order."""

    status: int
    verdicts: tuple[str, ...]
    text: str

    @property
    def agreed(self) -> tuple[int, tuple[str, ...]]:
        """What must be the same everywhere."""
        return self.status, self.verdicts

    def in_words(self) -> str:
        """The status and how many of each verdict."""
        counts = {tag: self.verdicts.count(tag) for tag in dict.fromkeys(sorted(self.verdicts))}
        rest = ", ".join(f"{count} {tag}" for tag, count in counts.items())
        return f"{self.status}; {rest}" if rest else str(self.status)


def programs(
    progress: Progress = lambda text, share: None, cache: Cache | None = None
) -> dict[str, bytes]:
    """The built programs by name, from the cache or built into it; or a GuestError."""
    cache = cache or Cache()
    files = cache.find(ITEM)
    if files is None:
        with cache.lock():
            _build(cache, progress)
        files = cache.find(ITEM)
        assert files is not None
    return {name: path.read_bytes() for name, path in files.items()}


def _build(cache: Cache, progress: Progress) -> None:
    for tool, package in (("gcc", "gcc-multilib"), ("make", "make"), ("dpkg", "dpkg")):
        if shutil.which(tool) is None:
            raise GuestError(f"building the selftests needs {tool}: install {package}")
    apt = Apt(cache.root / "apt", "amd64")
    apt.update(progress)
    with explained(cache.root), tempfile.TemporaryDirectory(dir=cache.root, prefix=".st-") as work:
        source = apt.download(PACKAGE, Path(work), progress)
        progress(f"Unpacking {PACKAGE}", None)
        pattern = f"usr/src/{PACKAGE}.tar.xz"
        tree = Path(work) / "source.tar.xz"
        tree.write_bytes(deb.files(source, [pattern])[pattern])
        with tarfile.open(tree, "r:xz") as archive:
            for member in archive:
                _, _, inside = member.name.partition("/")
                if inside.startswith(WANTED):
                    archive.extract(member, work, filter="data")
        folder, out = Path(work) / PACKAGE / TREE / "x86", Path(work) / "out"
        out.mkdir()
        progress("Building the selftests", None)
        bits = [f"CAN_BUILD_{what}=1" for what in ("I386", "X86_64", "WITH_NOPIE")]
        done = subprocess.run(
            ["make", "-k", "-C", folder, "CC=gcc -static -s", f"OUTPUT={out}", *bits, "all"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        built = {path.name: path.read_bytes() for path in sorted(out.glob("*_[36][24]"))}
        if done.returncode != 0 or not built:
            why = [line for line in done.stderr.splitlines() if "rror" in line][:1]
            raise GuestError(f"the selftests do not build ({why}): install gcc-multilib")
        version = source.name.split("_")[1]
    cache.store(ITEM, built, {"package": PACKAGE, "version": version})


def endings(transcript: str) -> dict[str, Ending]:
    """What SCRIPT printed, program by program."""
    found = {}
    for match in re.finditer(r"^=== (\w+_\d\d)\n(.*?)^=== status (\d+)$", transcript, re.M | re.S):
        text = match.group(2)
        tags = re.findall(r"\[(OK|FAIL|SKIP|WARN)\]", text)
        found[match.group(1)] = Ending(int(match.group(3)), tuple(tags), text)
    return found


def suited(built: Mapping[str, bytes], guest: str = GUEST) -> dict[str, bytes]:
    """Those of the programs that a kernel can run."""
    ends = ("_32", "_64") if _architecture(guest) == "amd64" else ("_32",)
    return {name: data for name, data in built.items() if name.endswith(ends)}


def archive(built: Mapping[str, bytes], guest: str = GUEST) -> bytes:
    """The initramfs with the programs and a first process that runs them by itself."""
    extra = {f"selftests/{name}": data for name, data in suited(built, guest).items()}
    busybox = debian.busybox(architecture=_architecture(guest))
    return initramfs.build(busybox, extra | {"sbin/selftests": INIT.encode()})


def _architecture(guest: str) -> str:
    return debian.PACKAGES[guest].architecture


def in_guest(
    initrd: Path, *, engine: str = "dbt", only: str = "", guest: str = GUEST, windows: bool = False
) -> dict[str, Ending]:
    """Run them in an understudy guest, through the agent.

    `only`: the names of a few.  `windows`: they are forced on from its reset.
    """
    kernel = debian.fetch(guest)
    script = SCRIPT.replace("*_[36][24]", only or "*_[36][24]")
    with VM(MEMORY, engine=engine) as vm:
        if windows:
            force_windows(vm)
        append = f"{kernel.append} {APPEND}"
        entry = loader.load(vm.memory, kernel.kernel, initrd=initrd, append=append, rsdp=RSDP_GPA)
        vm.enter(entry)
        done = vm.run(f"cd /selftests\n{script}", timeout_wall_s=WALL_SECONDS)
        assert not windows or window_counts(vm)["window_fills"] > 0
        vm.power_off()
    return endings(done.raw.decode("utf-8", "replace"))


def under_tcg(initrd: Path, guest: str = GUEST) -> dict[str, Ending]:
    """Run them under QEMU TCG, with the same kernel and initramfs."""
    kernel = debian.fetch(guest)
    with tempfile.TemporaryDirectory() as work:
        image, output = Path(work) / "kernel", Path(work) / "output"
        image.write_bytes(
            kernel.kernel if isinstance(kernel.kernel, bytes) else kernel.kernel.read_bytes()
        )
        subprocess.run(
            ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", MEMORY,
             "-nodefaults", "-display", "none", "-no-reboot", "-kernel", image, "-initrd", initrd,
             "-append", f"{kernel.append} {APPEND} rdinit=/sbin/selftests",
             "-serial", "null", "-serial", f"file:{output}"],
            check=True, timeout=WALL_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return endings(output.read_text(errors="replace").replace("\r\n", "\n"))


def natively(built: Mapping[str, bytes]) -> dict[str, Ending]:
    """Run them on this computer, whose kernel is not the guest's."""
    with tempfile.TemporaryDirectory() as work:
        for name, data in built.items():
            (Path(work) / name).write_bytes(data)
            (Path(work) / name).chmod(0o755)
        done = subprocess.run(
            ["sh", "-c", SCRIPT], cwd=work, capture_output=True, check=False, timeout=WALL_SECONDS
        )
    return endings(done.stdout.decode("utf-8", "replace"))


def main() -> None:
    """Print the table; with the name of a folder, leave there what the programs printed."""
    guest = next((argument for argument in sys.argv[1:] if argument in KERNELS), GUEST)
    built = programs(lambda text, share: print(text, share or "", file=sys.stderr))
    built = suited(built, guest)
    initrd = Cache().write(f"initramfs/selftests-{guest}.cpio", archive(built, guest))
    places = {
        "understudy": in_guest(initrd, guest=guest),
        "QEMU TCG": under_tcg(initrd, guest),
        "native": natively(built),
    }
    print(f"| program | {' | '.join(places)} | |\n|---|{'---|' * len(places)}---|")
    for name in built:
        ends = [place.get(name) for place in places.values()]
        cells = [end.in_words() if end else "did not end" for end in ends]
        same = all(end and ends[0] and end.agreed == ends[0].agreed for end in ends)
        print(f"| {name} | {' | '.join(cells)} | {'' if same else '≠'} |")
    for folder in (Path(argument) for argument in sys.argv[1:] if argument not in KERNELS):
        for place, found in places.items():
            text = "".join(f"=== {name}\n{end.text}\n" for name, end in found.items())
            (folder / f"{place.replace(' ', '-')}.log").write_text(text)


if __name__ == "__main__":
    main()
