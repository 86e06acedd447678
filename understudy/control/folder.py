"""Where the sockets, logs and consoles of a user's hosts are, and which hosts are up.

In `understudy` of XDG_RUNTIME_DIR, or else `understudy-UID` of the folder for temporary files, a
host NAME has NAME.lock, NAME.sock, NAME.log and NAME.consoles/.

Source: XDG Base Directory Specification; flock(2).
Invariants: the folder is its owner's alone, or is not used; whoever has a host's lock is that host;
what a dead one has left is taken away only by somebody who has its lock.
"""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from understudy.control.actions import ControlError


def folder() -> Path:
    """The folder, made if need be.  ControlError if it is not for this user alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        path = Path(runtime) / "understudy"
    else:
        path = Path(tempfile.gettempdir()) / f"understudy-{os.geteuid()}"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as problem:
        raise ControlError(f"{path}: {problem.strerror or problem}") from None
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    if not is_private or found.st_uid != os.geteuid():
        raise ControlError(
            f"{path}: expected a folder of yours that no other user may enter (mode 0700)"
        )
    return path


def socket_of(name: str) -> Path:
    """The socket of a host."""
    return folder() / f"{name}.sock"


def log_of(name: str) -> Path:
    """What a host in the background has said."""
    return folder() / f"{name}.log"


def consoles_of(name: str) -> Path:
    """The folder with a file for each VM's console."""
    return folder() / f"{name}.consoles"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Be this host.  ControlError if another process is."""
    descriptor = _locked(folder() / f"{name}.lock")
    if descriptor is None:
        raise ControlError(f"a host {name!r} is up already: understudy down {name}")
    try:
        yield
    finally:
        os.close(descriptor)


def hosts() -> list[str]:
    """The names of the hosts that are up; what dead ones have left is taken away."""
    names = sorted(path.stem for path in folder().glob("*.sock"))
    return [name for name in names if not _is_dead(name)]


def _is_dead(name: str) -> bool:
    try:
        descriptor = _locked(folder() / f"{name}.lock")
    except ControlError:
        return False
    if descriptor is None:
        return False
    with suppress(OSError):
        socket_of(name).unlink()
    os.close(descriptor)
    return True


def _locked(path: Path) -> int | None:
    """The file, locked; None if somebody else has the lock.

    It is never unlinked: two could have a lock then, each on a file of his own.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise ControlError(f"{path}: {problem.strerror or problem}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
