"""The disk from which cloud-init takes user-data, read by the format's own rules."""

import struct
from pathlib import Path

import pytest

from understudy.backends import fat, seed
from understudy.backends.locked import ImageError
from understudy.backends.opening import open_disk
from understudy.disk import Disk

USER_DATA = b"#cloud-config\nhostname: a\n"


def files(volume: bytes) -> dict[str, bytes]:
    """A FAT12's files by their long names, found as a reader of the specification finds them."""
    sector, per_cluster, reserved, copies, entries, _, _, fat_sectors = struct.unpack_from(
        "<HBHBHHBH", volume, 11
    )
    table = volume[reserved * sector :]
    root = (reserved + copies * fat_sectors) * sector
    start, cluster = root + 32 * entries, sector * per_cluster
    one, other = (volume[(reserved + n * fat_sectors) * sector :] for n in (0, 1))
    assert one[: fat_sectors * sector] == other[: fat_sectors * sector]
    found, long = dict[str, bytes](), ""
    for at in range(root, start, 32):
        entry = volume[at : at + 32]
        if not entry[0]:
            break
        if entry[11] == 0x0F:
            piece = entry[1:11] + entry[14:26] + entry[28:32]
            long = piece.decode("utf-16-le").split("\0")[0].rstrip("\uffff") + long
            continue
        if entry[11] & 0x08:
            found["label"] = entry[:11]
            continue
        check = 0
        for byte in entry[:11]:
            check = ((check >> 1) | (check & 1) << 7) + byte & 0xFF
        assert volume[at - 32 + 13] == check
        number, size = struct.unpack_from("<HI", entry, 26)
        content = b""
        while size and number < 0xFF8:
            place = start + (number - 2) * cluster
            content += volume[place : place + cluster]
            pair = int.from_bytes(table[number // 2 * 3 :][:3], "little")
            number = pair >> 12 * (number & 1) & 0xFFF
        found[long] = content[:size]
        assert len(content) < size + cluster
        long = ""
    return found


def test_files_of_all_lengths_are_found_again() -> None:
    content = {
        "user-data": bytes(range(256)) * 300,
        "a name of more than thirteen characters": b"x" * fat.CLUSTER,
        "empty": b"",
        "thirteen-char": b"y" * (fat.CLUSTER + 1),
    }
    volume = fat.volume("cidata", content)
    assert len(volume) == fat.SECTORS * fat.SECTOR
    assert files(volume) == {"label": b"CIDATA     ", **content}
    assert fat.volume("cidata", content) == volume


def test_it_is_fat12_and_bounded() -> None:
    assert fat.CLUSTERS < 4085
    assert (fat.CLUSTERS + 2) * 12 <= fat.FAT_SECTORS * fat.SECTOR * 8
    whole = bytes([1]) * fat.ROOM
    assert files(fat.volume("x", {"all": whole}))["all"] == whole
    with pytest.raises(ValueError, match="do not fit"):
        fat.volume("x", {"all": whole, "more": b"1"})
    with pytest.raises(ValueError, match="do not fit"):
        fat.volume("x", {f"{n}": b"" for n in range(40)})


def test_user_data_and_an_instance_that_follows_from_them(tmp_path: Path) -> None:
    file = tmp_path / "user-data"
    file.write_bytes(USER_DATA)
    disk = open_disk(Disk(str(file), format="nocloud"), is_snapshot=True)
    assert disk.is_read_only
    found = files(disk.read(0, disk.size))
    assert found["user-data"] == USER_DATA
    assert found["meta-data"].startswith(b"instance-id: understudy-")
    other = seed.Seed(USER_DATA + b"more")
    assert files(other.data)["meta-data"] != found["meta-data"]
    kept = disk.save()
    seed.read(file).load(kept)
    with pytest.raises(ValueError, match="snapshot"):
        other.load(kept)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hostname: a\n", "does not begin as user-data of cloud-init do: expected #cloud-config"),
        (b"", "does not begin"),
        (b"#!" + bytes(seed.LARGEST), "is larger than 1 MiB"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_user_data(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "user-data"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImageError, match=words):
        seed.read(file)
