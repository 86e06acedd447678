"""Disks for tests: tables of partitions, and file systems with files in them."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from understudy.backends.medium import Zeros, check_range

MIB = 1 << 20


class Bytes(Zeros):
    """A disk of these bytes, which nobody can write."""

    def __init__(self, data: bytes) -> None:
        super().__init__(len(data))
        self.data = data

    def read(self, offset: int, length: int) -> bytes:
        check_range(self, offset, length)
        return self.data[offset : offset + length]


def mbr(size: int, rows: list[tuple[int, int, int]]) -> bytes:
    """A disk with a Master Boot Record: (type, first sector, sectors) of each partition."""
    data = bytearray(size)
    for number, (kind, first, count) in enumerate(rows):
        struct.pack_into("<B3xB3xII", data, 446 + 16 * number, 0, kind, first, count)
    data[510:512] = b"\x55\xaa"
    return bytes(data)


def gpt(size: int, rows: list[tuple[int, int]]) -> bytes:
    """A disk with a GUID partition table: (first, last sector) of each partition."""
    data = bytearray(mbr(size, [(0xEE, 1, size // 512 - 1)]))
    struct.pack_into("<8s64xQII", data, 512, b"EFI PART", 2, 128, 128)
    for number, (first, last) in enumerate(rows):
        struct.pack_into("<16s16sQQ", data, 1024 + 128 * number, b"a type", b"own", first, last)
    return bytes(data)


def ext4(folder: Path, files: dict[str, bytes | str], size: int = 8 * MIB) -> bytes:
    """A file system with these files; a text is the target of a symbolic link."""
    program = shutil.which("mke2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if program is None:
        pytest.skip("mke2fs (e2fsprogs) is not on this computer")
    pytest.importorskip("understudy._images", reason="the binding of ext4-view is not compiled")
    tree, image = folder / "tree", folder / "ext4.img"
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    tree.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([program, "-q", "-t", "ext4", "-d", str(tree), str(image)], check=True)
    shutil.rmtree(tree)
    return image.read_bytes()


def fat(folder: Path, files: dict[str, bytes], size: int = 40 * MIB) -> bytes:
    """A file system, a FAT32 if it is large enough for one, with these files."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    make, copy, folders = (shutil.which(one, path=path) for one in ("mkfs.vfat", "mcopy", "mmd"))
    if make is None or copy is None or folders is None:
        pytest.skip("mkfs.vfat (dosfstools) or mcopy (mtools) is not on this computer")
    pytest.importorskip("understudy._images", reason="the binding of fatfs is not compiled")
    image, one = folder / "fat.img", folder / "file"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([make, str(image)], check=True, stdout=subprocess.DEVNULL)
    made: set[str] = set()
    for name, content in files.items():
        parts = name.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if above not in made:
                subprocess.run([folders, "-i", str(image), f"::/{above}"], check=True)
                made.add(above)
        one.write_bytes(content)
        subprocess.run([copy, "-i", str(image), str(one), f"::/{name}"], check=True)
    return image.read_bytes()
