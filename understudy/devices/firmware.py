"""What firmware leaves behind in memory: vectors, the BIOS data areas, and a way to start again.

A VM has no firmware: loaders start a guest as firmware and a boot loader would.  Some guests look
for what a BIOS leaves all the same.  Left are:

* the interrupt vector table: each vector leads to an IRET, those that start the machine again to
  the reset;
* the BIOS data area: the serial ports, the equipment, the end of base memory, the place of the
  extended area, an empty keyboard buffer;
* the extended BIOS data area, at the end of base memory: its size;
* the reset vector with the date and the machine's model behind it.  Its code resets the machine
  by the keyboard's controller, else by port 0xCF9, and else halts.  It is the way of a guest that
  reboots "by BIOS".

Source: IBM PC AT Technical Reference, "BIOS" and "ROM BIOS Data Area"; its entry points are at the
addresses that its listing has, because programs came to rely on them.  The port 0xCF9 is that
of Intel's 82371SB ("Reset Control Register").
Not left: services (an INT returns at once), SMBIOS and MultiProcessor tables, video memory.

Invariants: nothing lies in memory that `GuestMemory.ranges` calls usable, but for the first 0x500
bytes, which no loader gives away; no piece overlaps the ACPI tables.
"""

import struct
from typing import Final

from understudy.arch.memory_map import EXTENDED_BIOS_DATA, LEGACY_HOLE

SEGMENT: Final = 0xF000  # real-address mode; linear 0xF0000
POST, BOOTSTRAP, DUMMY, RESET = 0xE05B, 0xE6F2, 0xFF53, 0xFFF0  # offsets in it
DATE: Final = b"11/28/26"
MODEL_AT: Final = 0xFC

VECTORS: Final = 256
STARTING: Final = (0x18, 0x19)  # "ROM BASIC" and "Bootstrap": there is nothing to fall back to

# The BIOS data area.
SERIAL_PORTS, EQUIPMENT, KEYBOARD_BUFFER = 0x400, 0x410, 0x41A
EXTENDED_SEGMENT, BASE_KIB, BUFFER_BOUNDS = 0x40E, 0x413, 0x480
COPROCESSOR = 1 << 1  # of the equipment; bits 9 to 11 count the serial ports
EMPTY_BUFFER = struct.pack("<HH", 0x1E, 0x1E)  # head and tail, from 0x400 on

START_AGAIN: Final = bytes.fromhex(
    "fa"  # cli
    "b0fe e664"  # mov al, 0xfe; out 0x64, al: pulse the reset line of the keyboard's controller
    "baf90c"  # mov dx, 0xcf9
    "b002 ee"  # mov al, 2; out dx, al: a hard reset
    "b006 ee"  # mov al, 6; out dx, al: now
    "f4 ebfd"  # hlt; jmp to it
)


def pieces(serial_ports: tuple[int, ...]) -> dict[int, bytes]:
    """All of it, by gpa."""
    base, end = SEGMENT << 4, EXTENDED_BIOS_DATA
    equipment = COPROCESSOR | len(serial_ports) << 9
    vectors = [BOOTSTRAP if n in STARTING else DUMMY for n in range(VECTORS)]
    return {
        0: b"".join(struct.pack("<HH", offset, SEGMENT) for offset in vectors),
        SERIAL_PORTS: struct.pack(f"<{len(serial_ports)}H", *serial_ports),
        EXTENDED_SEGMENT: struct.pack("<H", end >> 4),
        EQUIPMENT: struct.pack("<H", equipment),
        BASE_KIB: struct.pack("<H", end >> 10),
        KEYBOARD_BUFFER: EMPTY_BUFFER,
        BUFFER_BOUNDS: struct.pack("<HH", 0x1E, 0x3E),
        end: bytes(((LEGACY_HOLE[0] - end) >> 10,)),
        base + POST: START_AGAIN,
        base + BOOTSTRAP: _jump(POST),
        base + DUMMY: b"\xcf",  # iret
        base + RESET: _jump(POST) + DATE + bytes((0, MODEL_AT, 0)),
    }


def _jump(offset: int) -> bytes:
    """A far jump in real-address mode, to the segment of the BIOS."""
    return struct.pack("<BHH", 0xEA, offset, SEGMENT)
