"""The initramfs archive, read back by an independent parser."""

import gzip
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from understudy.guests import GuestError, initramfs

BUSYBOX = b"\x7fELF....\0\0[\0[[\0cat\0mount\0mount.x\0sh\0\0more"


class Found(NamedTuple):
    mode: int
    data: bytes
    fields: list[int]


def unpack(archive: bytes) -> dict[str, Found]:
    entries, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        entries[name] = Found(mode, archive[at : at + size], fields)
        at = (at + size + 3) & ~3


def test_contents() -> None:
    files = unpack(initramfs.build(BUSYBOX))
    assert files["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert files["init"].mode == stat.S_IFREG | 0o755
    assert files["bin/busybox"].data == BUSYBOX
    assert (files["bin/sh"].mode, files["bin/sh"].data) == (stat.S_IFLNK | 0o777, b"busybox")
    assert files["dev/console"].fields[9:11] == [5, 1]
    assert files["tmp"].mode == stat.S_IFDIR | 0o1777
    prompt = b"PS1='" + initramfs.PROMPT + b"'"
    assert prompt in files["etc/profile"].data
    for name in files:  # a parent comes before its children
        parents = [str(parent) for parent in Path(name).parents if str(parent) != "."]
        order = list(files)
        assert all(order.index(parent) < order.index(name) for parent in parents)


def test_same_inputs_give_same_bytes() -> None:
    one = initramfs.build(BUSYBOX, {"x/y": b"1", "a": b"2"}, gzip=True)
    other = initramfs.build(BUSYBOX, {"a": b"2", "x/y": b"1"}, gzip=True)
    assert one == other
    files = unpack(gzip.decompress(one))
    assert {found.fields[5] for found in files.values()} == {0}  # mtime
    assert {found.fields[2] for found in files.values()} == {0}  # owner


def test_extra_files() -> None:
    files = unpack(initramfs.build(BUSYBOX, {"/opt/t/run": b"x", "init": (b"mine", 0o700)}))
    assert files["opt/t/run"][:2] == (stat.S_IFREG | 0o755, b"x")
    assert files["opt/t"].mode == stat.S_IFDIR | 0o755
    assert files["init"][:2] == (stat.S_IFREG | 0o700, b"mine")
    for path in ("", "/", "../x", "a//b"):
        with pytest.raises(GuestError, match="no path"):
            initramfs.build(BUSYBOX, {path: b""})


def test_applets_are_read_from_the_program() -> None:
    assert initramfs.applets(BUSYBOX) == ["[", "[[", "cat", "mount", "mount.x", "sh"]
    with pytest.raises(GuestError, match="is it busybox-static"):
        initramfs.build(b"\x7fELF and nothing else")
    with pytest.raises(GuestError, match="no ELF program"):
        initramfs.build(b"#!/bin/sh")


@pytest.mark.parametrize("script", ["init", "console", "profile"])
def test_scripts_are_shell(script: str) -> None:
    path = Path(initramfs.__file__).parent / "rootfs" / script
    subprocess.run(["sh", "-n", str(path)], check=True)
