"""Partitions of disks made here, and of disks that nobody would make."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.guests.disks import MIB, Bytes, gpt, mbr
from understudy.guests.partitions import MOST, Extent, extents


def test_a_disk_without_a_table_is_one_piece() -> None:
    assert extents(Bytes(bytes(MIB))) == [Extent(0, MIB, 0)]


def test_primary_partitions_in_their_order() -> None:
    disk = Bytes(mbr(MIB, [(0x83, 2048, 4), (0, 0, 0), (0x0C, 64, 8), (0, 0, 0)]))
    assert extents(disk) == [Extent(0, MIB, 0), Extent(64 * 512, 8 * 512, 3)]
    disk = Bytes(mbr(2 * MIB, [(0x83, 2048, 4), (0x82, 64, 8)]))
    assert extents(disk)[1:] == [Extent(2048 * 512, 4 * 512, 1), Extent(64 * 512, 8 * 512, 2)]


def test_logical_partitions_are_a_chain_that_ends() -> None:
    data = bytearray(mbr(MIB, [(0x05, 100, 1000)]))
    data[100 * 512 : 101 * 512] = mbr(512, [(0x83, 1, 10), (0x05, 50, 100)])
    data[150 * 512 : 151 * 512] = mbr(512, [(0x83, 2, 20)])
    found = extents(Bytes(bytes(data)))[1:]
    assert found == [Extent(101 * 512, 10 * 512, 5), Extent(152 * 512, 20 * 512, 6)]
    data[150 * 512 : 151 * 512] = mbr(512, [(0x83, 2, 20), (0x05, 50, 100)])  # itself
    assert len(extents(Bytes(bytes(data)))) == MOST + 1


def test_a_guid_table() -> None:
    disk = Bytes(gpt(MIB, [(40, 49), (64, 127)]))
    assert extents(disk)[1:] == [Extent(40 * 512, 10 * 512, 1), Extent(64 * 512, 64 * 512, 2)]


def test_what_lies_outside_of_the_disk_is_left_out() -> None:
    assert len(extents(Bytes(mbr(MIB, [(0x83, 2000, 49)])))) == 1
    assert len(extents(Bytes(gpt(MIB, [(40, 1 << 40), (50, 49)])))) == 1


@given(st.binary(max_size=64), st.integers(0, 600), st.booleans())
def test_no_table_does_harm(noise: bytes, at: int, is_gpt: bool) -> None:
    data = bytearray(gpt(4096 * 4, [(8, 9)]) if is_gpt else mbr(4096 * 4, [(0x05, 1, 20)]))
    data[at : at + len(noise)] = noise
    struct.pack_into("<H", data, 510, 0xAA55)
    disk = Bytes(bytes(data))
    assert all(0 <= e.start <= e.start + e.length <= disk.size for e in extents(disk))
