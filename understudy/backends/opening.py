"""From the choices about a disk to its content.

Source: ours.  Invariant: every failure is an `ImageError`, one line that says what to do.
"""

from pathlib import Path

from understudy.backends import seed
from understudy.backends.locked import ImageError
from understudy.backends.medium import Medium
from understudy.backends.overlay import Overlay
from understudy.backends.qcow2 import Qcow2
from understudy.backends.raw import Raw
from understudy.disk import Disk

__all__ = ["ImageError", "open_disk"]


def open_disk(disk: Disk, *, is_snapshot: bool = False) -> Medium:
    """The disk, locked; with an overlay if it asks for one, or if nothing is to be written."""
    if disk.format == "nocloud":
        return seed.read(Path(disk.file))
    overlay = not disk.is_read_only and (disk.is_overlay or is_snapshot)
    path, is_read_only = Path(disk.file), disk.is_read_only or overlay
    image: Medium
    if disk.format == "qcow2" or (disk.format == "auto" and path.suffix == ".qcow2"):
        image = Qcow2(path, is_read_only=is_read_only)
    else:
        image = Raw(path, is_read_only=is_read_only, is_surely_raw=disk.format == "raw")
    if not overlay:
        return image
    try:
        return Overlay(image)
    except OSError as error:
        image.close()
        raise ImageError(
            f"{disk.file}: no temporary file for its overlay ({error.strerror}): set TMPDIR to a "
            "folder with room"
        ) from None
