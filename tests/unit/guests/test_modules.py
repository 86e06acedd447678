"""Drivers out of a kernel's package: which, in which order, and the tables for modprobe."""

import lzma
import stat
from collections.abc import Callable, Iterator

import pytest

from understudy.guests import modules
from understudy.guests.entry import GuestError

FOLDER = "lib/modules/6.1.0"


def module(name: str, depends: str, *aliases: str) -> bytes:
    strings = [f"alias={a}" for a in aliases] + [f"depends={depends}", f"name={name}"]
    return b"\x7fELF\0" + b"".join(s.encode() + b"\0" for s in strings)


PACKAGE = {
    "boot/vmlinuz": b"kernel",
    f"{FOLDER}/modules.builtin": b"",
    f"{FOLDER}/kernel/drivers/virtio/virtio.ko": module("virtio", "virtio-ring"),
    f"{FOLDER}/kernel/drivers/virtio/virtio_ring.ko": module("virtio_ring", ""),
    f"{FOLDER}/kernel/drivers/virtio/virtio_pci.ko": module(
        "virtio_pci", "virtio,virtio_ring", "pci:v00001AF4d*"
    ),
    f"{FOLDER}/kernel/fs/ext4/ext4.ko": module("ext4", "", "fs-ext4", "ext4"),
    f"{FOLDER}/kernel/sound/snd.ko": module("snd", ""),
}

Chosen = Callable[[Callable[[str], bool]], Iterator[tuple[str, bytes]]]


def chosen(package: dict[str, bytes]) -> Chosen:
    return lambda wanted: ((p, c) for p, c in package.items() if wanted(p))


def test_those_wanted_and_all_that_they_need_and_no_others() -> None:
    nodes = modules.drivers(chosen(PACKAGE))
    assert sorted(name for name in nodes if name.endswith(".ko")) == [
        f"{FOLDER}/kernel/drivers/virtio/virtio.ko",
        f"{FOLDER}/kernel/drivers/virtio/virtio_pci.ko",
        f"{FOLDER}/kernel/drivers/virtio/virtio_ring.ko",
        f"{FOLDER}/kernel/fs/ext4/ext4.ko",
    ]
    assert nodes[modules.FIRST].mode == stat.S_IFREG | 0o755


def test_the_table_of_dependencies_ends_with_what_is_needed_first() -> None:
    lines = modules.drivers(chosen(PACKAGE))[f"{FOLDER}/modules.dep"].data.decode().splitlines()
    virtio = "kernel/drivers/virtio/virtio"
    assert f"{virtio}_pci.ko: {virtio}.ko {virtio}_ring.ko" in lines
    assert f"{virtio}_ring.ko:" in lines


def test_the_kernel_finds_a_file_system_by_its_alias() -> None:
    table = modules.drivers(chosen(PACKAGE))[f"{FOLDER}/modules.alias"].data.decode()
    assert "alias fs-ext4 ext4\n" in table and "alias pci:v00001AF4d* virtio_pci\n" in table


def test_packed_modules_below_usr_come_out_as_the_others() -> None:
    packed = {
        f"usr/{path}.xz" if path.endswith(".ko") else path: lzma.compress(content)
        for path, content in PACKAGE.items()
    }
    assert modules.drivers(chosen(packed)) == modules.drivers(chosen(PACKAGE))


def test_what_is_damaged_or_missing_is_told() -> None:
    damaged = {**PACKAGE, f"{FOLDER}/kernel/a.ko.xz": b"\xfd7zXZ\0 and no more"}
    with pytest.raises(GuestError, match=r"a\.ko\.xz"):
        modules.drivers(chosen(damaged))
    lacking = {p: c for p, c in PACKAGE.items() if "ring" not in p}
    with pytest.raises(GuestError, match="virtio_ring"):
        modules.drivers(chosen(lacking))
    with pytest.raises(GuestError, match="0 folders"):
        modules.drivers(chosen({}))
