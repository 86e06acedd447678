"""What disks would start: file systems made by this computer's own program."""

from pathlib import Path

import pytest

from tests.unit.guests.disks import MIB, Bytes, ext4, fat, gpt, mbr
from understudy.guests import GuestError, boot_disk, payload
from understudy.guests.boot_disk import Found

CONFIG = b"label a\nlinux /vmlinuz\ninitrd /initrd.img\nappend root=/dev/vda ro\n"
FILES: dict[str, bytes | str] = {
    "boot/extlinux/extlinux.conf": CONFIG,
    "boot/vmlinuz-6.1": b"a kernel" * 100_000,
    "boot/initrd.img-6.1": b"an initrd",
    "vmlinuz": "boot/vmlinuz-6.1",
    "initrd.img": "/boot/initrd.img-6.1",
}
FOUND = Found(b"a kernel" * 100_000, b"an initrd\0\0\0", "root=/dev/vda ro")


def test_a_file_system_on_the_whole_disk(tmp_path: Path) -> None:
    assert boot_disk.read(Bytes(ext4(tmp_path, FILES)), "x") == FOUND


@pytest.mark.parametrize("table", [mbr, gpt])
def test_a_file_system_in_a_partition(table: object, tmp_path: Path) -> None:
    inside = ext4(tmp_path, FILES)
    first, count = 2048, len(inside) // 512
    head = mbr(MIB, [(0x82, 64, 8), (0x83, first, count)])
    if table is gpt:
        head = gpt(MIB, [(64, 71), (first, first + count - 1)])
    assert boot_disk.read(Bytes(head + inside), "x") == FOUND


@pytest.mark.parametrize("folder", ["boot/grub", "grub", "boot/grub2"])
def test_grub_on_a_disk(folder: str, tmp_path: Path) -> None:
    text = b"menuentry 'a' {\n linux /k a=b\n initrd /i1 /i2\n}\n"
    files: dict[str, bytes | str] = {
        f"{folder}/grub.cfg": text, "k": b"kernel", "i1": b"one", "i2": b"two2",
    }  # fmt: skip
    found = boot_disk.read(Bytes(ext4(tmp_path, files)), "x")
    assert found == Found(b"kernel", b"one\0two2", "a=b")


def test_the_boot_loader_specification_on_a_disk(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "loader/entries/a-1.conf": b"linux /k1\noptions old\n",
        "loader/entries/a-2.conf": b"linux k2\noptions new\n",
        "k1": b"1", "k2": b"2",
    }  # fmt: skip
    disk = Bytes(ext4(tmp_path, files))
    assert boot_disk.read(disk, "x") == Found(b"2", None, "new")
    assert boot_disk.file_on(disk, "/k1", 10) == b"1"


ENTRIES = {
    "loader/loader.conf": b"timeout 3\ndefault 0123-*\n",
    "loader/entries/0123-6.1.0.conf": b"title old\nlinux /0123/6.1.0/linux\noptions old\n",
    "loader/entries/0123-6.12.0.conf": (
        b"title new\nlinux /0123/6.12.0/linux\ninitrd /0123/6.12.0/initrd\noptions root=/dev/vda2\n"
    ),
    "loader/entries/zzz.conf": b"linux /0123/6.1.0/linux\n",
    "0123/6.1.0/linux": b"the old kernel",
    "0123/6.12.0/linux": b"the new kernel" * 100_000,
    "0123/6.12.0/initrd": b"four",
}
ENTERED = Found(b"the new kernel" * 100_000, b"four", "root=/dev/vda2")


@pytest.mark.parametrize("size", [2 * MIB, 40 * MIB])
def test_the_boot_loader_specification_on_a_fat(size: int, tmp_path: Path) -> None:
    """As systemd-boot has it: in the EFI system partition, before that of the root."""
    assert boot_disk.read(Bytes(fat(tmp_path, ENTRIES, size)), "x") == ENTERED


def test_an_efi_system_partition_and_what_it_has_not(tmp_path: Path) -> None:
    esp, root = fat(tmp_path, ENTRIES), ext4(tmp_path, {"file": b"x"})
    first, then = 2048, 2048 + len(esp) // 512
    head = gpt(MIB, [(first, then - 1), (then, then + len(root) // 512 - 1)])
    assert boot_disk.read(Bytes(head + esp + root), "x") == ENTERED
    stub = {"EFI/debian/grub.cfg": b"search.fs_uuid 1 root\nconfigfile /boot/grub/grub.cfg\n"}
    esp, root = fat(tmp_path, stub), ext4(tmp_path, FILES)
    assert boot_disk.read(Bytes(head + esp + root), "x") == FOUND
    with pytest.raises(GuestError, match="found: FAT without a boot loader's configuration"):
        boot_disk.read(Bytes(esp), "x")


def test_a_fat_with_grub_and_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    files = {"grub/grub.cfg": b"menuentry 'a' {\n linux /K a=b\n}\n", "k": b"kernel"}
    assert boot_disk.read(Bytes(fat(tmp_path, files)), "x") == Found(b"kernel", None, "a=b")
    del files["k"]
    with pytest.raises(GuestError, match="starts a file that is not there: /K"):
        boot_disk.read(Bytes(fat(tmp_path, files)), "x")


def test_a_folder_whose_clusters_lead_in_a_circle(tmp_path: Path) -> None:
    many = {f"loader/entries/{n:04}-a-name-of-some-length.conf": b"" for n in range(40)}
    data = bytearray(fat(tmp_path, many, 2 * MIB))
    table = 512 * int.from_bytes(data[14:16], "little")
    links = data[table : table + 512 * int.from_bytes(data[22:24], "little")]
    for at in range(3, len(links) - 1, 3):  # of a FAT12: each cluster is followed by itself
        even = at * 2 // 3
        pair = even | even + 1 << 12
        if any(links[at : at + 3]):
            data[table + at : table + at + 3] = pair.to_bytes(3, "little")
    with pytest.raises(GuestError, match="x: its file system cannot be read") as caught:
        boot_disk.read(Bytes(bytes(data)), "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", range(40))
def test_a_damaged_fat_does_no_harm(step: int, tmp_path: Path) -> None:
    data = bytearray(fat(tmp_path, ENTRIES, 2 * MIB))
    for at in range(11 + 7 * step, len(data), 512 + 31 * step):
        data[at] ^= 0x5A
    try:
        boot_disk.read(Bytes(bytes(data)), "x")
    except GuestError as error:
        assert "\n" not in str(error)


def test_a_file_that_is_too_long_or_not_there(tmp_path: Path) -> None:
    disk = Bytes(ext4(tmp_path, {"file": b"12345"}))
    with pytest.raises(GuestError, match=r"/file on the disk cannot be read: .* 5 bytes"):
        boot_disk.file_on(disk, "/file", 4)
    with pytest.raises(GuestError, match="/file/x on the disk cannot be read: no such file"):
        boot_disk.file_on(disk, "/file/x", 4)


def test_what_cannot_be_started_is_said_in_a_line(tmp_path: Path) -> None:
    gone = ext4(tmp_path, {"boot/extlinux/extlinux.conf": CONFIG})
    plain = ext4(tmp_path, {"file": b"x"})
    broken = bytearray(MIB)
    broken[82:87] = b"FAT32"
    for data, words in (
        (bytes(MIB), "x has no file system that is known here, to boot from: say --kernel FILE"),
        (b"XFSB" + bytes(MIB), r"found: xfs; expected ext4 or FAT"),
        (bytes(broken), "x: its file system cannot be read"),
        (plain, "found: ext4 without a boot loader's configuration"),
        (gone, "x: its boot loader starts a file that is not there: /initrd.img"),
        (plain[:1024] + bytes(56) + b"\x53\xef" + bytes(MIB), "its file system cannot be read"),
        (plain[:2048], "its file system cannot be read"),
    ):
        with pytest.raises(GuestError, match=words) as caught:
            boot_disk.read(Bytes(data), "x")
        assert "\n" not in str(caught.value)


def test_initrds_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = b"label a\nlinux /k\ninitrd /i,/i,/i\n"
    files: dict[str, bytes | str] = {"extlinux/extlinux.conf": config, "k": b"k", "i": b"12345678"}
    disk = Bytes(ext4(tmp_path, files))
    assert boot_disk.read(disk, "x").initrd == b"12345678" * 3
    monkeypatch.setattr(payload, "LIMIT", 20)
    with pytest.raises(GuestError, match="x: /i has 8 bytes, expected 4 at most"):
        boot_disk.read(disk, "x")


@pytest.mark.parametrize("step", range(40))
def test_a_damaged_file_system_does_no_harm(step: int, tmp_path: Path) -> None:
    data = bytearray(ext4(tmp_path, FILES, 4 * MIB))
    for at in range(1024 + 7 * step, len(data), 4096 + 31 * step):
        data[at] ^= 0x5A
    try:
        boot_disk.read(Bytes(bytes(data)), "x")
    except GuestError as error:
        assert "\n" not in str(error)
