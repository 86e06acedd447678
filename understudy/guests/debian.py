"""The guests that have names: Debian's kernels with a busybox user land, memtest86+, and hello.

Packages come through `apt`, are kept in `cache`, and nothing is fetched twice.
Invariant: `fetch` gives a guest whose every byte was verified just now, or one GuestError.
"""

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from understudy.guests import deb, hello, initramfs, teaching
from understudy.guests.apt import Apt, Progress
from understudy.guests.cache import Cache, explained
from understudy.guests.entry import GuestError
from understudy.guests.release import RELEASES

LINUX_APPEND = "console=ttyS0 panic=-1"
LINUX_32_APPEND = f"{LINUX_APPEND} cryptomgr.notests noisapnp"
"""Of the 4.3 G instructions of a 32-bit boot, 3.7 G would be the kernel's own tests of its ciphers,
and 0.35 G a search for cards on a bus that the PC does not have."""


DOM0_APPEND = "console=hvc0 panic=-1"


@dataclass(frozen=True)
class Guest:
    """A guest ready to be loaded with `loader.load`."""

    name: str
    description: str
    version: str  # of the package
    kernel: Path | bytes
    initrd: Path | None
    append: str
    modules: tuple[tuple[Path, str], ...] = ()  # for a Multiboot kernel, with their command lines
    is_firmware: bool = False  # `kernel` is an image of a ROM


@dataclass(frozen=True)
class Listed:
    """A line of `understudy fetch --list`."""

    name: str
    description: str
    status: str  # "built in", "fetched", "not fetched"
    version: str


class Package(NamedTuple):
    """How to find a guest's package, and the file in it."""

    description: str
    prefix: str  # of the package names among which `pattern` chooses
    pattern: str  # a whole package name; group 1 is the version in the name
    file: str
    backports: bool = False
    architecture: str = "amd64"
    append: str = LINUX_APPEND
    linux: bool = True
    kept_as: str = "kernel"
    dom0: str = ""  # the guest that a hypervisor starts first, as its modules
    is_firmware: bool = False


def _kernel(
    description: str,
    series: str,
    flavour: str,
    backports: bool = False,
    architecture: str = "amd64",
) -> Package:
    version = rf"({re.escape(series)}\.\d[\d.]*(?:[+~-][a-z]*[\d.]+)*)"
    return Package(
        description,
        f"linux-image-{series}.",
        rf"linux-image-{version}-{flavour}(?:-unsigned)?",
        "boot/vmlinuz-*",
        backports,
        architecture,
        LINUX_32_APPEND if architecture == "i386" else LINUX_APPEND,
    )


def _busybox(architecture: str) -> Package:
    return Package(
        "busybox, statically linked",
        "busybox-static",
        "(busybox-static)",
        "bin/busybox",
        architecture=architecture,
    )


def _u_boot(board: str, bits: str) -> Package:
    return Package(
        f"U-Boot, a boot loader that is firmware, {bits} bits",
        "u-boot-qemu",
        "(u-boot-qemu)",
        f"u-boot/{board}/u-boot.rom",
        append="",
        linux=False,
        is_firmware=True,
    )


PACKAGES = {
    "cloud-amd64": _kernel("Debian's Linux 6.1 for clouds, with busybox", "6.1", "cloud-amd64"),
    "amd64": _kernel("Debian's Linux 6.1 for any PC, with busybox", "6.1", "amd64"),
    "cloud-amd64-6.12": _kernel(
        "Debian's Linux 6.12 for clouds, with busybox", "6.12", "cloud-amd64", backports=True
    ),
    "686": _kernel(
        "Debian's Linux 6.1 for 32-bit PCs without PAE, with busybox",
        "6.1",
        "686",
        architecture="i386",
    ),
    "686-pae": _kernel(
        "Debian's Linux 6.1 for 32-bit PCs with PAE, with busybox",
        "6.1",
        "686-pae",
        architecture="i386",
    ),
    "memtest86+": Package(
        "memtest86+, a memory tester, on the serial port",
        "memtest86+",
        "(memtest86\\+)",
        "boot/memtest86+*x64.bin",
        append="console=ttyS0,115200",
        linux=False,
    ),
    "memtest86+ia32": Package(
        "memtest86+ for 32-bit PCs, on the serial port",
        "memtest86+",
        "(memtest86\\+)",
        "boot/memtest86+*ia32.bin",
        append="console=ttyS0,115200",
        linux=False,
    ),
    "xen": Package(
        "Xen, with Debian's Linux 6.1 and busybox as its first domain",
        "xen-hypervisor-",
        r"xen-hypervisor-(\d[\d.]*)-amd64",
        "boot/xen-*-amd64.gz",
        append="com1=115200,8n1 console=com1",
        linux=False,
        dom0="amd64",
    ),
    "gnumach": Package(
        "GNU Mach, a microkernel, without servers",
        "gnumach-image-",
        r"gnumach-image-(\d[\d.]*)-486",
        "boot/gnumach-*-486.gz",
        architecture="i386",
        append="console=com0",
        linux=False,
    ),
    "u-boot": _u_boot("qemu-x86", "32"),
    "u-boot-64": _u_boot("qemu-x86_64", "64"),
}
BUILT_IN = ("hello", *teaching.GUESTS)
NAMES = (*BUILT_IN, *PACKAGES, *RELEASES)


def listing(cache: Cache | None = None) -> list[Listed]:
    """All guests that have names, and which of them are here."""
    cache = cache or Cache()
    rows = [Listed("hello", hello.DESCRIPTION, "built in", "")]
    rows += [Listed(name, one.description, "built in", "") for name, one in teaching.GUESTS.items()]
    items = [(name, name, package.description) for name, package in PACKAGES.items()]
    items += [(name, release.item, release.description) for name, release in RELEASES.items()]
    for name, item, description in items:
        fetched, version = cache.has(item), ""
        if fetched:
            try:
                version = str(cache.manifest(item).get("version", ""))
            except GuestError:
                version = "damaged"
        rows.append(Listed(name, description, "fetched" if fetched else "not fetched", version))
    return rows


def fetch(
    name: str, progress: Progress = lambda text, share: None, cache: Cache | None = None
) -> Guest:
    """A guest by name; what is not in the cache is fetched.  Every failure is a GuestError."""
    if name == "hello":
        return Guest(name, hello.DESCRIPTION, "", hello.image(), None, "")
    if name in teaching.GUESTS:
        own = teaching.GUESTS[name]
        return Guest(name, own.description, "", own.path, None, "")
    if name in RELEASES:
        raise GuestError(f"{name} is a whole system on a disk, no kernel for this: choose another")
    if name not in PACKAGES:
        raise GuestError(f"unknown guest {name!r}: expected one of {', '.join(NAMES)}")
    cache = cache or Cache()
    package = PACKAGES[name]
    kernel = _obtain(cache, name, package, progress)
    version = str(cache.manifest(name).get("version", ""))
    initrd = user_land(progress, cache, package.architecture) if package.linux else None
    modules: tuple[tuple[Path, str], ...] = ()
    if package.dom0:
        first = fetch(package.dom0, progress, cache)
        assert isinstance(first.kernel, Path) and first.initrd is not None
        modules = ((first.kernel, DOM0_APPEND), (first.initrd, ""))
    return Guest(
        name,
        package.description,
        version,
        kernel,
        initrd,
        package.append,
        modules,
        package.is_firmware,
    )


def busybox(
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
    architecture: str = "amd64",
) -> bytes:
    """The busybox program, for making an initramfs with files of one's own."""
    item = "busybox-static" + suffix(architecture)
    return _obtain(cache or Cache(), item, _busybox(architecture), progress).read_bytes()


def user_land(
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
    architecture: str = "amd64",
) -> Path:
    """The plain initramfs, made from the fetched busybox of the architecture."""
    cache = cache or Cache()
    archive = initramfs.build(busybox(progress, cache, architecture))
    return cache.keep("initramfs", ".cpio", archive)


def _obtain(cache: Cache, item: str, package: Package, progress: Progress) -> Path:
    """The one file of a package, from the cache or fetched into it."""
    files = cache.find(item)
    if files is None:
        with cache.lock():
            files = cache.find(item)  # another process may have been quicker
            if files is None:
                _fetch(cache, item, package, progress)
                files = cache.find(item)
    if files is None or len(files) != 1:
        raise GuestError(f"the cached {item} is not as expected: remove {cache.folder(item)}")
    return next(iter(files.values()))


def _fetch(cache: Cache, item: str, package: Package, progress: Progress) -> None:
    apt = apt_for(cache, package)
    apt.update(progress)
    name = newest(apt.names(package.prefix), package.pattern)
    if name is None and apt.trouble is not None:
        raise apt.trouble
    if name is None:
        wanted = package.prefix.rstrip(".")
        raise GuestError(
            f"{item}: the computer's package sources ({', '.join(apt.suites())}) have no package "
            f"{wanted}* for {package.architecture}: "
            "add a Debian suite that has it, or use a kernel file of your own"
        )
    with explained(cache.root), tempfile.TemporaryDirectory(dir=cache.root, prefix=".get-") as work:
        archive = apt.download(name, Path(work), progress)
        progress(f"Unpacking {name}", None)
        content = deb.files(archive, [package.file])[package.file]
        about = {
            "package": name,
            "version": archive.name.split("_")[1].replace("%3a", ":"),
            "package_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        }
    cache.store(item, {package.kept_as: content}, about)
    progress(f"Fetched {name}", 1.0)


def apt_for(cache: Cache, package: Package) -> Apt:
    """The package client with the sources in which the package is."""
    folder = ("apt-backports" if package.backports else "apt") + suffix(package.architecture)
    return Apt(cache.root / folder, package.architecture, backports=package.backports)


def suffix(architecture: str) -> str:
    """What tells a name in the cache from its namesake of the usual architecture."""
    return "" if architecture == "amd64" else f"-{architecture}"


def newest(names: list[str], pattern: str) -> str | None:
    """Of the package names that match, the one with the highest version; signed before not."""

    def rank(name: str) -> tuple[list[int], bool]:
        found = re.fullmatch(pattern, name)
        assert found is not None
        numbers = [int(number) for number in re.findall(r"\d+", found.group(1))]
        return numbers, not name.endswith("-unsigned")

    return max((n for n in names if re.fullmatch(pattern, n)), key=rank, default=None)
