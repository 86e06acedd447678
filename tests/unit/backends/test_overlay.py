"""Overlays: what was written is above, the rest below; against a plain array of bytes."""

import json
import os
import random
from pathlib import Path

import pytest

from understudy.backends.medium import Zeros
from understudy.backends.opening import open_disk
from understudy.backends.overlay import CLUSTER, Overlay
from understudy.disk import Disk

SIZE = 10 * CLUSTER + 512


def test_it_is_as_if_the_file_were_written_and_the_file_is_not(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = bytearray(random.Random(1).randbytes(SIZE))
    image.write_bytes(content)
    overlay = open_disk(Disk(str(image), is_overlay=True))
    chance = random.Random(2)
    for _ in range(300):
        offset = chance.randrange(SIZE)
        count = chance.randrange(min(SIZE - offset, 3 * CLUSTER) + 1)
        if chance.random() < 0.4:
            data = chance.randbytes(count)
            overlay.write(offset, data)
            content[offset : offset + count] = data
        elif chance.random() < 0.1:
            overlay.zero(offset, count, may_unmap=True)
            content[offset : offset + count] = bytes(count)
        else:
            assert overlay.read(offset, count) == content[offset : offset + count]
    assert overlay.read(0, SIZE) == content
    assert image.read_bytes() == random.Random(1).randbytes(SIZE)
    again = open_disk(Disk(str(image), is_overlay=True))
    again.write(0, b"of no use")
    again.load(json.loads(json.dumps(overlay.save())))
    assert again.read(0, SIZE) == content
    again.close()
    overlay.close()
    overlay.close()


def test_only_what_was_written_is_saved() -> None:
    overlay = Overlay(Zeros(1 << 30))
    overlay.write(5 * CLUSTER + 1, b"x")
    overlay.write(6 * CLUSTER, bytes(CLUSTER))
    overlay.write((1 << 30) - 1, b"y")
    starts = [(start, count) for start, count, _ in overlay.save()["written"]]
    assert starts == [(5 * CLUSTER, 2 * CLUSTER), ((1 << 30) - CLUSTER, CLUSTER)]


def test_it_keeps_as_much_as_the_disk_has() -> None:
    overlay = Overlay(Zeros(SIZE))
    for step in (700, CLUSTER, 3 * CLUSTER - 1):
        for at in range(0, SIZE, step):
            overlay.write(at, bytes([step & 0xFF]) * min(step, SIZE - at))
    assert overlay.written == set(range(-(-SIZE // CLUSTER)))
    assert os.fstat(overlay.fd).st_size == SIZE
    with pytest.raises(ValueError, match="of a disk of"):
        overlay.write(SIZE, b"x")


@pytest.mark.parametrize(
    "piece",
    [[1, CLUSTER, "00"], [0, 0, ""], [0, CLUSTER, "00"], [0, 1 << 40, "00"], [0, CLUSTER, "zz"],
     [1 << 40, CLUSTER, None], "x"],
)  # fmt: skip
def test_a_hostile_snapshot_is_refused(piece: object) -> None:
    overlay = Overlay(Zeros(1 << 20))
    good = Overlay(Zeros(1 << 20))
    good.write(0, b"x" * CLUSTER)
    packed = good.save()["written"][0][2]
    if isinstance(piece, list) and piece[2] is None:
        piece[2] = packed
    with pytest.raises(ValueError):
        overlay.load({"below": {"size": 1 << 20}, "written": [piece]})
    with pytest.raises(ValueError, match="something else"):
        overlay.load(None)
