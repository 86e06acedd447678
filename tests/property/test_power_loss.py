"""Power may fail at any point: what was flushed is there, and nothing that nobody wrote.

A recording storage stands below the disk.  It knows which writes the computer's own cache may
still hold: these are lost, kept or reordered, sector by sector, at each of many cut points.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Block Device", on VIRTIO_BLK_T_FLUSH: writes that
were completed before the flush was submitted are in stable storage when it completes.
"""

import random
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, VERSION_1, Driver
from understudy.backends.medium import check_range, write_zeros

SECTOR, SECTORS = 512, 24
IN, OUT, FLUSH, ZERO = 0, 1, 4, 13
FLUSH_FEATURE, ZEROES_FEATURE = 1 << 9, 1 << 14


class Written(NamedTuple):
    """A sector that was given to the computer."""

    sector: int
    data: bytes


class Recording:
    """A disk of the computer with a cache.  The log has writes, and None for each flush."""

    is_read_only = False

    def __init__(self) -> None:
        self.size = SECTORS * SECTOR
        self.content = bytearray(self.size)
        self.log: list[Written | None] = []

    def read(self, offset: int, length: int) -> bytes:
        check_range(self, offset, length)
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        check_range(self, offset, len(data))
        assert offset % SECTOR == len(data) % SECTOR == 0
        self.content[offset : offset + len(data)] = data
        for at in range(0, len(data), SECTOR):
            self.log.append(Written((offset + at) // SECTOR, bytes(data[at : at + SECTOR])))

    def flush(self) -> None:
        self.log.append(None)

    def discard(self, offset: int, length: int) -> None:
        raise AssertionError("nobody discards here")

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        write_zeros(self, offset, length)

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, saved: Any) -> None: ...

    def close(self) -> None: ...


class Forgetful(Recording):
    """One that does not flush."""

    def flush(self) -> None: ...


class Promise(NamedTuple):
    """What the driver may rely on from a moment on: the log was so long, and each sector so."""

    moment: int
    stable: dict[int, bytes]


def traffic(disk: Recording, chance: random.Random, *, flushes: bool) -> list[Promise]:
    """A driver writes, zeroes and flushes; what it was promised on the way."""
    d = Driver("virtio_blk", medium=disk)
    d.start(VERSION_1 | ZEROES_FEATURE | (FLUSH_FEATURE if flushes else 0))
    current = {n: bytes(SECTOR) for n in range(SECTORS)}
    promises = [Promise(0, dict(current))]

    def ask(kind: int, sector: int, out: bytes) -> None:
        d.request(0, struct.pack("<IIQ", kind, 0, sector) + out, 1)
        assert d.memory.read(BUFFERS + 16 + len(out), 1) == b"\0"

    for _ in range(40):
        sector = chance.randrange(SECTORS)
        count = chance.randint(1, min(4, SECTORS - sector))
        if flushes and chance.random() < 0.2:
            ask(FLUSH, 0, b"")
        elif chance.random() < 0.1:
            ask(ZERO, 0, struct.pack("<QII", sector, count, 0))
            current |= {sector + n: bytes(SECTOR) for n in range(count)}
            if flushes:
                continue
        else:
            data = chance.randbytes(SECTOR * count)
            ask(OUT, sector, data)
            current |= {sector + n: data[SECTOR * n :][:SECTOR] for n in range(count)}
            if flushes:
                continue
        promises.append(Promise(len(disk.log), dict(current)))
    return promises


def survivors(log: list[Written | None], chance: random.Random) -> Iterator[dict[int, bytes]]:
    """What is on the computer's disk when its power fails after the log: some possibilities."""
    flushed = max((n for n, one in enumerate(log) if one is None), default=-1) + 1
    stable = {one.sector: one.data for one in log[:flushed] if one is not None}
    loose = [one for one in log[flushed:] if one is not None]
    for kept in (0.0, 0.5, 0.9):
        some = [one for one in loose if chance.random() < kept]
        chance.shuffle(some)
        yield stable | {one.sector: one.data for one in some}


def check(disk: Recording, promises: list[Promise], chance: random.Random) -> int:
    """At each cut point every sector has what was promised, or what was written later."""
    cuts = 0
    for end in range(len(disk.log) + 1):
        promise = [p for p in promises if p.moment <= end][-1]
        later: dict[int, set[bytes]] = {}
        # What was written before the promise, too, up to where it became stable, is older.
        for one in disk.log[promise.moment : end]:
            if one is not None:
                later.setdefault(one.sector, set()).add(one.data)
        for found in survivors(disk.log[:end], chance):
            cuts += 1
            for sector in range(SECTORS):
                data = found.get(sector, bytes(SECTOR))
                allowed = {promise.stable[sector]} | later.get(sector, set())
                assert data in allowed, f"sector {sector} after {end} steps of the log"
    return cuts


@pytest.mark.parametrize("flushes", [True, False], ids=["flushes", "writes through"])
def test_what_was_flushed_is_there_wherever_power_fails(flushes: bool) -> None:
    cuts, run = 0, 0
    while cuts < 10_000:
        run += 1
        chance, disk = random.Random(run), Recording()
        cuts += check(disk, traffic(disk, chance, flushes=flushes), chance)


@pytest.mark.parametrize("flushes", [True, False])
def test_the_check_finds_a_disk_that_does_not_flush(flushes: bool) -> None:
    chance, disk = random.Random(1), Forgetful()
    promises = traffic(disk, chance, flushes=flushes)
    with pytest.raises(AssertionError, match="sector"):
        check(disk, promises, chance)
