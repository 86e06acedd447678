"""The image of a whole Debian, from the cache or made once; and such an image with more packages.

Source: ours.
Invariants: an image in the cache is never written again, since disks stand on it; it is called
after its bytes, so that none is taken for another.
"""

import hashlib
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from understudy.backends.opening import open_disk
from understudy.backends.qcow2_new import create
from understudy.disk import Disk
from understudy.guests import agent_program, boot_disk, deb, debian, root_on_disk
from understudy.guests.apt import Apt, Progress
from understudy.guests.cache import Cache, explained
from understudy.guests.entry import GuestError
from understudy.guests.initramfs import Node
from understudy.guests.packages import NAME
from understudy.guests.release import ESSENTIAL, RELEASES, Release
from understudy.whole_debian import archive, making
from understudy.whole_debian.making import Boot

UNPACK: Final = {"spread": "Copying packages", "first": "", "unpack": "Unpacking packages"}
CONFIGURE: Final = {"configure": "Configuring packages", "settle": "Finishing"}
MORE: Final = {"spread": "Copying packages", "unpack": "Unpacking packages",
               "configure": "Configuring packages"}  # fmt: skip
SCRIPT: Final = "second-stage"
LABEL: Final = "debian"
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"  # in the guest
STATUS: Final = "/var/lib/dpkg/status"
LARGEST_STATUS: Final = 64 << 20
KERNEL: Final = re.compile(r"linux-image-\d.*_.*_.*\.deb")
RAMDISK: Final = "boot/initrd.understudy"
"""Not called as Debian calls its own, which a trigger makes anew: that takes minutes."""


def image(
    name: str,
    boot: Boot,
    packages: Sequence[str] = (),
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
) -> Path:
    """The qcow2 image of a guest of `RELEASES`, with more packages; made first if need be."""
    release, cache = RELEASES[name], cache or Cache()
    base = cache.made(release.item, lambda: _make(cache, release, boot, progress))
    names = sorted(set(packages))
    if not names:
        return base
    for one in names:
        if not NAME.fullmatch(one):
            raise GuestError(
                f"{one!r} is no name of a Debian package: expected small letters, digits and +.-"
            )
    told = hashlib.sha256(f"{base.name} {' '.join(names)}".encode()).hexdigest()[:8]
    item = f"{release.item}-with-{'-'.join(names)[:60]}-{told}"
    return cache.made(item, lambda: _extend(cache, item, release, base, names, boot, progress))


def is_here(name: str, cache: Cache | None = None) -> bool:
    """Whether the image has been made."""
    return (cache or Cache()).has(RELEASES[name].item)


def _make(cache: Cache, release: Release, boot: Boot, progress: Progress) -> None:
    """From packages to an image in the cache."""
    apt = _apt(cache, release, progress)
    folder = cache.root / "making" / release.item
    chosen = _fetched(apt, release.packages, folder / "packages", progress)
    base = [chosen[one.name] for one in apt.needs(ESSENTIAL) if one.name in chosen]
    kernel = next((p for p in chosen.values() if KERNEL.fullmatch(p.name)), None)
    if kernel is None or not base:
        raise GuestError(f"{release.item}: its packages have no kernel, or nothing essential")
    ramdisk = root_on_disk.build(
        debian.busybox(progress, cache), lambda wanted: deb.chosen(kernel, wanted)
    )
    ours = _ours(apt.sources()) | {RAMDISK: _file(ramdisk)}
    key = _key(chosen.values(), ours)
    own = making.uuid_of(key)
    config = _ours_text("extlinux.conf").format(uuid=own)
    ours["boot/extlinux/extlinux.conf"] = _file(config.encode())
    ours["etc/fstab"] = _file(f"UUID={own} / ext4 errors=remount-ro 0 0\n".encode())

    work = _work(folder, key)
    packages, part, unpacked = work / "packages.tar", work / "part.img", work / "unpacked.img"
    with explained(cache.root):
        progress("Unpacking what dpkg needs", None)
        archive.write(packages, base, chosen.values(), ours)
        if not unpacked.exists():
            making.file_system(part, own, LABEL, making.SIZE)
            making.carry_out(boot, part, packages, _script(), UNPACK, len(chosen), progress)
            part.rename(unpacked)
        making.copied(unpacked, part)
        making.carry_out(boot, part, packages, _script(), CONFIGURE, len(chosen), progress)
        progress("Packing the image", None)
        new = work / "new.qcow2"
        new.unlink(missing_ok=True)
        making.packed(part, new)
        _keep(cache, release.item, new, chosen)
        shutil.rmtree(folder)
    progress(f"Made {release.item}", 1.0)


def _extend(
    cache: Cache, item: str, release: Release, base: Path, names: Sequence[str], boot: Boot,
    progress: Progress,
) -> None:  # fmt: skip
    """From an image and packages to an image over it."""
    apt = _apt(cache, release, progress)
    folder = cache.root / "making" / item
    disk = open_disk(Disk(str(base), is_read_only=True))
    try:
        size, installed = disk.size, boot_disk.file_on(disk, STATUS, LARGEST_STATUS)
    finally:
        disk.close()
    with explained(cache.root):
        folder.mkdir(parents=True, exist_ok=True)
        status = folder / "status"
        status.write_bytes(installed)
        chosen = _fetched(apt, names, folder / "packages", progress, status)
        new, packages = folder / "new.qcow2", folder / "packages.tar"
        new.unlink(missing_ok=True)
        create(new, size, base)
        if chosen:
            archive.write(packages, [], chosen.values(), {})
            making.carry_out(boot, new, packages, _script(), MORE, len(chosen), progress)
        _keep(cache, item, new, chosen)
        shutil.rmtree(folder)
    progress(f"Made {item}", 1.0)


def _apt(cache: Cache, release: Release, progress: Progress) -> Apt:
    apt = Apt(cache.root / f"apt-{release.codename}", "amd64", release=release.codename)
    apt.update(progress)
    if apt.trouble is not None:
        raise apt.trouble
    return apt


def _fetched(
    apt: Apt, names: Sequence[str], folder: Path, progress: Progress, status: Path | None = None
) -> dict[str, Path]:
    """The packages that these names need, by their names in apt's order."""
    found = apt.download_with_needs(names, folder, progress, status)
    by_name = {path.name.rpartition("_")[0]: path for path in found}
    needed = apt.needs(names, status)
    files = {one.name: by_name.get(one.file) for one in needed}
    chosen = {name: path for name, path in files.items() if path is not None}
    if len(chosen) != len(needed):
        missing = ", ".join(name for name, path in files.items() if path is None)
        raise GuestError(f"apt-get did not download {missing}")
    return chosen


def _keep(cache: Cache, item: str, image: Path, packages: Mapping[str, Path]) -> None:
    with image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    image.chmod(0o444)
    names = sorted(path.name.removesuffix(".deb") for path in packages.values())
    version = next((n.split("_")[1] for n in names if n.startswith("base-files_")), "")
    about = {"version": version, "packages": " ".join(names).replace("%3a", ":")}
    cache.store(item, {f"disk-{digest[:16]}.qcow2": image}, about)


def _work(folder: Path, key: str) -> Path:
    """The folder in which it is made; what others have left half done there goes."""
    work = folder / key[:16]
    for other in folder.glob("*"):
        if other not in (work, folder / "packages"):
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _key(packages: Iterable[Path], ours: Mapping[str, Node]) -> str:
    """All that the image follows from, as a number."""
    told = hashlib.sha256(f"{making.SIZE} {making.FEATURES}\n".encode())
    for path in sorted(packages):
        told.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for name, node in sorted(ours.items()):
        told.update(f"{name} {node.mode} {hashlib.sha256(node.data).hexdigest()}\n".encode())
    for name in (SCRIPT, "files/extlinux.conf"):
        told.update((resources.files(__package__) / name).read_bytes())
    return told.hexdigest()


def _ours(sources: str) -> dict[str, Node]:
    """The files that no package brings."""
    signed = re.sub(r"(?m)^Signed-By:.*\n", "", sources)
    signed = re.sub(r"(?m)^(Components:.*\n)", rf"\1Signed-By: {KEYRING}\n", signed)
    return {
        "etc/apt/sources.list.d/debian.sources": _file(signed.encode()),
        "etc/default/locale": _file(b"LANG=C.UTF-8\n"),
        "etc/hostname": _file(b"debian\n"),
        "etc/hosts": _file(b"127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost\n"),
        "etc/systemd/network/80-dhcp.network": _file(_ours_text("80-dhcp.network").encode()),
        "etc/systemd/system/understudy-agent.service": _file(
            _ours_text("understudy-agent.service").encode()
        ),
        "etc/udev/rules.d/90-understudy-agent.rules": _file(
            _ours_text("90-understudy-agent.rules").encode()
        ),
        "usr/lib/understudy/agent": Node(stat.S_IFREG | 0o755, agent_program.image()),
    }


def _script() -> bytes:
    return (resources.files(__package__) / SCRIPT).read_bytes()


def _ours_text(name: str) -> str:
    return (resources.files(__package__) / "files" / name).read_text()


def _file(data: bytes) -> Node:
    return Node(stat.S_IFREG | 0o644, data)
