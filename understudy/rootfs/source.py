"""Where a root file system comes from: a folder, a tar archive, or an OCI image layout on disk.

Source: tar(5); the OCI Image Format Specification, "Image Layout", "Image Index", "Image Manifest".
Invariants: nothing of it is run, and nothing outside of it is read; each piece of a layout has the
bytes that its name says; whatever is wrong is a GuestError of one line.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

import zstandard

from understudy import plain_file
from understudy.guests.entry import GuestError
from understudy.guests.unpack import ERRORS
from understudy.rootfs.tree import Content, Tree

MOST_BYTES: Final = 1 << 36  # of all layers: what is unpacked, and the files in them
MOST_TEXT: Final = 4 << 20  # of a description in a layout
MOST_LAYERS: Final = 1000
PIECE: Final = 1 << 20
LAYOUT: Final = "oci-layout"
ARCHITECTURE: Final = "amd64"
DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
INDEX: Final = re.compile(r".*(\.image\.index\.|\.manifest\.list\.).*")
LAYER: Final = re.compile(r".*\.(tar|diff\.tar)([.+](gzip|zstd))?")


def tree(source: Path, given: ExitStack, work: Path) -> Tree:
    """What is there.  It is read until `given` is closed; `work` is a folder for what is unpacked.

    GuestError says why not.
    """
    found = Tree(MOST_BYTES)
    with about(source):
        try:
            if not source.exists():
                raise GuestError("no such file or folder")
            if not source.is_dir():
                _lay(found, source, given, work)
                if LAYOUT in found.nodes:
                    raise GuestError(
                        "an OCI image layout in an archive: unpack it, and say its folder"
                    )
            elif (source / LAYOUT).exists():
                for layer in _layers(source):
                    _lay(found, layer, given, work)
            else:
                _fill(found, source)
            if not found.nodes:
                raise GuestError("there is no file in it")
        except OSError as error:
            raise GuestError(error.strerror or str(error)) from None
    return found


@contextmanager
def about(source: Path) -> Iterator[None]:
    """A GuestError in here says which root file system it is about."""
    try:
        yield
    except GuestError as error:
        raise GuestError(f"rootfs {source}: {error}") from None


# --- a folder ---


def _fill(found: Tree, top: Path) -> None:
    """What this user owns belongs to root in the guest, unless he is root himself."""
    links: dict[tuple[int, int], Content] = {}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        for path in sorted(folder.iterdir()):
            name = str(path.relative_to(top))
            about = path.lstat()
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = stat.S_IMODE(about.st_mode), int(about.st_mtime)
            info.uid = 0 if about.st_uid == os.getuid() else about.st_uid
            info.gid = 0 if about.st_gid == os.getgid() else about.st_gid
            content = None
            match stat.S_IFMT(about.st_mode):
                case stat.S_IFDIR:
                    info.type = tarfile.DIRTYPE
                    waiting.append(path)
                case stat.S_IFLNK:
                    info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
                case stat.S_IFREG:
                    identity = about.st_dev, about.st_ino
                    content = links.get(identity) or Content(about.st_size, partial(_opened, path))
                    if about.st_nlink > 1:
                        links[identity] = content
                case stat.S_IFIFO:
                    info.type = tarfile.FIFOTYPE
                case stat.S_IFCHR | stat.S_IFBLK as kind:
                    info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
                    info.devmajor, info.devminor = os.major(about.st_rdev), os.minor(about.st_rdev)
                case _:
                    continue  # a socket belongs to a program that runs
            found.put(name, info, content)


def _opened(path: Path) -> IO[bytes]:
    try:
        return plain_file.opened(path)
    except OSError as error:
        raise GuestError(f"{path} cannot be read: {error.strerror}") from None


# --- an archive ---


def _lay(found: Tree, file: Path, given: ExitStack, work: Path) -> None:
    """One more layer, from an archive however it is packed."""
    try:
        data = _unpacked(found, file, given, work)
        archive = tarfile.open(fileobj=data, mode="r:")  # noqa: SIM115 (`given`)
        found.lay(given.enter_context(archive))
    except GuestError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise GuestError(f"it is damaged: {error}") from None
    except ERRORS as error:
        raise GuestError(
            f"it is no tar archive, or damaged: {str(error) or type(error).__name__}"
        ) from None


def _unpacked(found: Tree, file: Path, given: ExitStack, work: Path) -> IO[bytes]:
    source = given.enter_context(plain_file.opened(file))
    start = source.read(6)
    source.seek(0)
    packed: Any
    if start.startswith(b"\x1f\x8b"):
        packed = gzip.GzipFile(fileobj=source)
    elif start.startswith(b"\xfd7zXZ\0"):
        packed = lzma.LZMAFile(source)  # noqa: SIM115 (it has the open file, and nothing else)
    elif start.startswith(b"BZh"):
        packed = bz2.BZ2File(source)
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        packed = zstandard.ZstdDecompressor().stream_reader(source)
    else:
        return source
    plain = tempfile.TemporaryFile(dir=work)  # noqa: SIM115 (`given`)
    given.callback(plain.close)
    while data := packed.read(PIECE):
        found.take(len(data))
        plain.write(data)
    plain.seek(0)
    return plain


# --- a layout ---


def _layers(layout: Path) -> list[Path]:
    """The archives of the one image for this processor, the lowest first."""
    entry = _chosen(layout, _described(layout / "index.json"))
    manifest = _described(_blob(layout, entry))
    layers = manifest.get("layers")
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        raise GuestError("its manifest has no list of layers")
    files = []
    for layer in layers:
        kind = layer.get("mediaType") if isinstance(layer, dict) else None
        if not isinstance(kind, str) or not LAYER.fullmatch(kind):
            raise GuestError(f"a layer of the kind {kind}: expected tar, packed by gzip or zstd")
        files.append(_blob(layout, layer))
    return files


def _chosen(layout: Path, index: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The manifest for this processor that an index names."""
    entries = index.get("manifests")
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise GuestError("its index has no list of manifests")
    fitting = [one for one in entries if _is_for_us(one.get("platform"))]
    if len(fitting) != 1:
        raise GuestError(
            f"its index has {len(fitting)} images for {ARCHITECTURE}, expected one: "
            "`skopeo copy` makes a layout of one image"
        )
    entry: dict[str, Any] = fitting[0]
    if INDEX.fullmatch(str(entry.get("mediaType"))):
        if depth > 2:
            raise GuestError("its indices do not end")
        return _chosen(layout, _described(_blob(layout, entry)), depth + 1)
    return entry


def _is_for_us(platform: Any) -> bool:
    if not isinstance(platform, dict):
        return True
    return (platform.get("os"), platform.get("architecture")) == ("linux", ARCHITECTURE)


def _blob(layout: Path, entry: dict[str, Any]) -> Path:
    """The file that an entry names, with the bytes that it should have."""
    found = DIGEST.fullmatch(str(entry.get("digest")))
    if not found:
        raise GuestError(f"a digest {entry.get('digest')!r:.80}: expected sha256:…")
    file = layout / "blobs" / "sha256" / found[1]
    if not file.is_file():
        raise GuestError(f"its blob {file.name[:16]}… is not there")
    with file.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != found[1]:
            raise GuestError(f"its blob {file.name[:16]}… has other bytes than its name says")
    return file


def _described(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_TEXT:
            raise ValueError("it is too long")
        value = json.loads(plain_file.read(file))
        if not isinstance(value, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise GuestError(f"its {file.name[:16]} cannot be understood: {error}") from None
    return value
