"""The disk of whoever runs a whole Debian: what he writes, over the image that all share.

Source: ours.  It is $XDG_DATA_HOME/understudy/NAME.qcow2: data of the user, which no cache's
cleaning takes away.
Invariants: the image below is never written; a disk that is there is used as it is.
"""

import os
from pathlib import Path

from understudy import plain_file
from understudy.backends.opening import ImageError, open_disk
from understudy.backends.qcow2 import HEADER_BYTES, backing
from understudy.backends.qcow2_new import create
from understudy.disk import Disk
from understudy.guests.entry import GuestError


def default_folder() -> Path:
    """$XDG_DATA_HOME/understudy, or ~/.local/share/understudy."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if base.startswith("/"):
        return Path(base) / "understudy"
    try:
        return Path.home() / ".local" / "share" / "understudy"
    except RuntimeError:
        raise GuestError("no home folder for the disk: set XDG_DATA_HOME to a folder") from None


def own_disk(image: Path, folder: Path | None = None) -> Path:
    """The user's disk over this image of the cache, new if there is none; GuestError."""
    path = (folder or default_folder()) / f"{image.parent.name}.qcow2"
    try:
        if not path.exists():
            disk = open_disk(Disk(str(image), is_read_only=True))
            try:
                create(path, disk.size, image)
            finally:
                disk.close()
            return path
        with plain_file.opened(path) as file:
            below = backing(path, file.read(HEADER_BYTES))
    except ImageError as error:
        raise GuestError(str(error)) from None
    except OSError as error:
        raise GuestError(f"{path}: {error.strerror}") from None
    if below is not None and not (path.parent / below.name).exists():
        raise GuestError(
            f"{path} stands on the image {below.name}, which is not there any more: remove {path} "
            "to begin anew (what was written to it is lost), or say --snapshot"
        )
    return path
