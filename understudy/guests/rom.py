"""Firmware as an image of a ROM: it ends at 4 GiB, and the processor starts at its reset vector.

Its end also appears at the end of the first mebibyte, where code in real-address mode reaches it.
Source: SDM 3A, "First Instruction Executed"; for the second place Intel 82371SB (PIIX3), "XBCS:
BIOS enable".  PCs copy that into RAM and execute it there ("shadowing"); here both places are RAM
from the beginning, and a guest that writes there finds what it wrote, until it is reset.
"""

from pathlib import Path

from understudy import plain_file
from understudy.arch.memory_map import HIGH_START, LEGACY_HOLE
from understudy.config import LARGEST_ROM, ROM_UNIT
from understudy.guests.entry import Entry, GuestError, GuestMemory

LOW_BYTES = 128 << 10
VECTOR = 16  # bytes from the end


def read(file: Path) -> bytes:
    """The image, checked; GuestError says what is wrong with it."""
    try:
        data = plain_file.read(file)
    except OSError as error:
        raise GuestError(f"firmware {file} cannot be read: {error.strerror or error}") from None
    if not data or len(data) > LARGEST_ROM or len(data) % ROM_UNIT:
        raise GuestError(
            f"firmware {file} has {len(data)} bytes: expected an image of a ROM, whole 64 KiB and "
            f"at most {LARGEST_ROM >> 20} MiB"
        )
    if data[-VECTOR:] in (bytes(VECTOR), b"\xff" * VECTOR):
        raise GuestError(f"firmware {file} has no reset vector in its last {VECTOR} bytes")
    return data


def load(memory: GuestMemory, data: bytes) -> Entry:
    """Put the image where the processor and programs look for it; start as after reset."""
    low = data[-LOW_BYTES:]
    memory.write(HIGH_START - len(data), data)
    memory.write(LEGACY_HOLE[1] - len(low), low)
    return Entry({}, "firmware")
