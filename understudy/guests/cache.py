"""Files that were fetched once: a folder per item under $XDG_CACHE_HOME/understudy.

Each item has a manifest with the SHA-256 of its files, checked at every use.
Invariants: an item is there whole or not at all (it is made in a folder beside and renamed);
one process at a time fetches; what was damaged is never handed out.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from understudy import plain_file
from understudy.guests.entry import GuestError

MANIFEST = "manifest.json"
FORMAT = 1


def default_root() -> Path:
    """$XDG_CACHE_HOME/understudy, or ~/.cache/understudy."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "understudy"
    try:
        return Path.home() / ".cache" / "understudy"
    except RuntimeError:
        raise GuestError("no home folder for the cache: set XDG_CACHE_HOME to a folder") from None


class Cache:
    """The items under one root folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def folder(self, item: str) -> Path:
        """Where an item is, or will be."""
        return self.root / "items" / item

    def has(self, item: str) -> bool:
        """Whether the item has been fetched (not whether it is undamaged)."""
        return (self.folder(item) / MANIFEST).is_file()

    def find(self, item: str) -> dict[str, Path] | None:
        """The item's files by name, verified; None if it was not fetched.

        GuestError if a file is damaged.
        """
        folder = self.folder(item)
        if not self.has(item):
            return None
        files = {}
        for name, recorded in self.manifest(item)["files"].items():
            path = folder / name
            try:
                found = _digest(path)
            except OSError as error:
                raise self._damaged(item, f"{path}: {error.strerror}") from None
            if found != recorded:
                raise self._damaged(item, f"{path} has SHA-256 {found[:16]}…, not {recorded[:16]}…")
            files[name] = path
        return files

    def manifest(self, item: str) -> dict[str, Any]:
        """What was recorded when the item was stored: "files", "package", "version", …"""
        path = self.folder(item) / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            files = manifest["files"]
            plain = all(isinstance(v, str) and Path(k).name == k for k, v in files.items())
            if manifest["format"] != FORMAT or not files or not plain:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged(item, f"{path} cannot be understood") from None
        assert isinstance(manifest, dict)
        return manifest

    def store(self, item: str, files: Mapping[str, bytes | Path], about: Mapping[str, str]) -> None:
        """Keep an item, in place of an older one of its name.  Call it under `lock`.

        What is a file already, on the same disk, is moved.
        """
        manifest = dict(about) | {
            "format": FORMAT,
            "files": {name: _digest(data) for name, data in files.items()},
        }
        folder = self.folder(item)
        with explained(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=f".{item}-", dir=folder.parent))
            try:
                for name, data in files.items():
                    if isinstance(data, Path):
                        data.rename(new / name)
                    else:
                        (new / name).write_bytes(data)
                (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
                new.chmod(0o755)
                if folder.exists():
                    shutil.rmtree(folder)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def write(self, name: str, data: bytes) -> Path:
        """Keep a file that can be made again at any time; one with these bytes is left alone."""
        path = self.root / name
        with explained(self.root):
            if path.is_file() and path.read_bytes() == data:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                Path(temporary).chmod(0o644)
                Path(temporary).replace(path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        return path

    def keep(self, folder: str, suffix: str, data: bytes) -> Path:
        """Keep a file that is called after what is in it."""
        digest = hashlib.sha256(data).hexdigest()[:16]
        return self.write(f"{folder}/{digest}{suffix}", data)

    def made(self, item: str, make: Callable[[], None]) -> Path:
        """The one file of an item, which `make` stores if it is not there; one process makes it."""
        files = self.find(item)
        if files is None:
            with self.lock(f"{item}.lock"):
                files = self.find(item)  # another process may have been quicker
                if files is None:
                    make()
                    files = self.find(item)
        if files is None or len(files) != 1:
            raise GuestError(f"the cached {item} is not as expected: remove {self.folder(item)}")
        return next(iter(files.values()))

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Only one process fetches at a time; the others wait."""
        with explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _damaged(self, item: str, how: str) -> GuestError:
        return GuestError(
            f"the cached {item} is damaged ({how}): remove {self.folder(item)} and fetch it again"
        )


def _digest(data: bytes | Path) -> str:
    """SHA-256 of bytes, or of a file, which is read piece by piece."""
    if isinstance(data, Path):
        with plain_file.opened(data) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Errors of the file system as one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise GuestError(explain(error, place)) from None


def explain(error: OSError, place: Path) -> str:
    """What an error of the file system under `place` means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(place)
    reason = error.strerror or str(error)
    return (
        f"cannot write to the cache {place} ({reason}): "
        "set XDG_CACHE_HOME to a folder that you may write to"
    )


def disk_full(place: Path) -> str:
    """The line for a full disk."""
    return (
        f"no space left for the cache {place}: free some, "
        "or set XDG_CACHE_HOME to a folder on another disk"
    )
