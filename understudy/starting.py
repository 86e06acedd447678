"""What a VM starts with: a kernel file, a guest by name, a ROM, or what its first disk says.

Source: none.
Invariant: what is on a disk is read at each start, so that a guest that has given itself a new
kernel has it after a reboot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from understudy.config import Config
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.devices.pc import PC
from understudy.devices.virtio.blk import Blk
from understudy.disk import Disk
from understudy.guests import boot_disk, debian, loader, network, rom, root_on_disk
from understudy.guests import modules as drivers
from understudy.guests import packages as debian_packages
from understudy.guests.apt import Progress
from understudy.guests.cache import Cache
from understudy.guests.entry import Entry, GuestError
from understudy.machine.machine import Machine
from understudy.whole_debian.own_disk import own_disk

PV = "pv"  # a boot protocol, and a technique of execution


@dataclass(frozen=True)
class Start:
    """What is loaded at each start."""

    kernel: bytes | Path | None = None
    """None: what the disk would start."""
    initrd: Path | None = None
    append: str = ""
    modules: tuple[tuple[Path, str], ...] = ()
    rom: bytes = b""
    disk: str = ""
    """By its name: others may come and go."""

    def load(self, at: Machine, seed: bytes) -> Entry:
        """Put it into the machine's memory.  GuestError says why not."""
        if self.rom:
            return rom.load(at.memory, self.rom)
        kernel: bytes | Path | None = self.kernel
        initrd: bytes | Path | None = self.initrd
        append = self.append
        if kernel is None:
            assert isinstance(at.board, PC)
            disk = at.board.parts.get(self.disk)
            if not isinstance(disk, Blk):
                raise GuestError(f"{self.disk}, from which the VM started, was unplugged")
            found = boot_disk.read(disk.medium, "the first disk")
            kernel, initrd = found.kernel, initrd or found.initrd
            append = f"{found.append} {append}".strip()
        return loader.load(
            at.memory, kernel, initrd=initrd, append=append, rsdp=RSDP_GPA, seed=seed,
            modules=self.modules,
        )  # fmt: skip


def check_entry(config: Config, entry: Entry) -> None:
    """GuestError if a kernel is none for the VM's technique of execution."""
    if (entry.protocol == PV) != (config.execution == PV):
        kind = "paravirtual: expected" if entry.protocol == PV else "not paravirtual: not for"
        raise GuestError(f"the kernel is {kind} --execution pv --paging pv")


def of_disk(config: Config, initrd: Path | None, append: str) -> Start:
    """From the first disk of the VM; GuestError if there is none."""
    if not config.disks:
        raise GuestError("a VM without a guest, a kernel or a disk has nothing to start")
    return Start(None, initrd, append, disk=config.disks[0].name or "disk0")


def of_name(
    guest: str,
    config: Config,
    initrd: Path | None,
    append: str,
    modules: Sequence[tuple[Path, str]],
    packages: Sequence[str],
    progress: Progress,
    *,
    has_own_root: bool = False,
) -> Start:
    """A guest by name that is no whole system, fetched if it is not in the cache.

    has_own_root: its root file system is on its first disk.
    """
    fetched = debian.fetch(guest, progress)
    if has_own_root and (guest not in debian.PACKAGES or not debian.PACKAGES[guest].linux):
        raise GuestError(f"{guest} has no use for a root file system: choose a Linux")
    if fetched.is_firmware:
        assert isinstance(fetched.kernel, Path)
        return Start(rom=rom.read(fetched.kernel))
    ramdisk = initrd or fetched.initrd
    append = f"{fetched.append} {append}".strip()
    if packages:
        ramdisk = _with_packages(guest, ramdisk, packages, progress)
    if initrd is None and ramdisk is not None and config.has_virtio:
        inserted = drivers.INSERTED + (drivers.BALLOON if config.balloon else ())
        inserted += drivers.FOLDERS if config.folders or config.hotplug else ()
        inserted += drivers.VSOCK if config.vsock or config.hotplug else ()
        ramdisk = drivers.with_drivers(
            guest, ramdisk, progress, more=_network(config, inserted), inserted=inserted
        )
        if has_own_root:
            ramdisk = Cache().keep(
                "initramfs", ".cpio", ramdisk.read_bytes() + root_on_disk.entering()
            )
        append = f"{append} {drivers.APPEND}"
    return Start(fetched.kernel, ramdisk, append, (*fetched.modules, *modules))


def with_image(config: Config, image: Path) -> Config:
    """With a whole Debian's disk as the first: the user's own, or one that is forgotten."""
    file = image if config.snapshot else own_disk(image)
    return replace(config, disks=(Disk(str(file)), *config.disks))


def with_root(config: Config, image: Path) -> Config:
    """With the disk of a root file system as the first; what is written to it is forgotten."""
    return replace(config, disks=(Disk(str(image), is_overlay=True), *config.disks))


def _with_packages(
    guest: str, ramdisk: Path | None, names: Sequence[str], progress: Progress
) -> Path:
    """The guest's RAM disk with Debian packages in it."""
    if ramdisk is None:
        raise GuestError(f"{guest} has no file system to unpack packages into: choose a Linux")
    architecture = debian.PACKAGES[guest].architecture
    return debian_packages.with_packages(ramdisk, names, progress, architecture=architecture)


def _network(config: Config, inserted: tuple[str, ...]) -> bytes:
    """What the guest needs to ask for an address, if it has a card at which somebody knows one."""
    users = [number for number, nic in enumerate(config.net) if nic.kind == "user"]
    return network.asking(f"eth{users[0]}", inserted) if users else b""
