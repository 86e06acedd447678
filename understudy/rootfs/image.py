"""The image of a root file system, from the cache or made once.

The computer only writes files, and root is who unpacks in the VM: owners, modes and devices are
those of the source without anybody being root (docs/decisions/0072-*).

Source: mke2fs(8).
Invariants: an image in the cache is called after what is in it and never written again; the same
files give the same bytes.
"""

import hashlib
import tempfile
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Final

from understudy.guests.apt import Progress
from understudy.guests.cache import Cache, explained
from understudy.rootfs.source import about, tree
from understudy.whole_debian import making
from understudy.whole_debian.making import Boot

STAGES: Final = {"fill": "Copying files"}
SCRIPT: Final = "unpack-in-vm"
LABEL: Final = "root"
ROOM: Final = 2  # times as large as its files is the disk, at least
FILE: Final = "root.qcow2"


def image(
    source: Path, boot: Boot, progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
) -> Path:  # fmt: skip
    """The qcow2 image with what is in a folder, an archive or a layout; GuestError."""
    cache = cache or Cache()
    with ExitStack() as given:
        with explained(cache.root):
            making_here = cache.root / "making"
            making_here.mkdir(parents=True, exist_ok=True)
            work = Path(
                given.enter_context(tempfile.TemporaryDirectory(dir=making_here, prefix="rootfs-"))
            )
        progress("Reading the root file system", None)
        found = tree(source, given, work)
        files, size = work / "files.tar", max(making.SIZE, ROOM * found.size)
        size = -(-size // making.UNIT) * making.UNIT
        with explained(cache.root), about(source):
            found.write(files)
        key = _key(files, size)
        item = f"rootfs-{key[:16]}"

        def make() -> None:
            part, new = work / "part.img", work / FILE
            making.file_system(part, making.uuid_of(key), LABEL, size)
            making.carry_out(boot, part, files, _script(), STAGES, 0, progress)
            progress("Packing the image", None)
            making.packed(part, new)
            new.chmod(0o444)
            cache.store(item, {FILE: new}, {"source": source.name})

        with explained(cache.root):
            return cache.made(item, make)


def _key(files: Path, size: int) -> str:
    """All that the image follows from, as a number."""
    told = hashlib.sha256(f"{size} {making.FEATURES}\n".encode())
    told.update(_script())
    with files.open("rb") as data:
        told.update(hashlib.file_digest(data, "sha256").digest())
    return told.hexdigest()


def _script() -> bytes:
    return (resources.files(__package__) / SCRIPT).read_bytes()
