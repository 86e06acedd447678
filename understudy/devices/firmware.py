"""What firmware leaves behind: in memory vectors, data areas and tables; in the chips, settings.

A VM has no firmware: loaders start a guest as firmware and a boot loader would.  Some guests look
for what a BIOS leaves all the same.  All of it, with the sources: docs/reference/firmware.md.  Here
are:

* the interrupt vector table: each vector leads to an IRET, those of the interrupt requests to code
  that ends them, that of the timer to code that counts, those that start the machine again to the
  reset;
* the BIOS data area: the serial ports, the equipment, the end of base memory, the place of the
  extended area, an empty keyboard buffer, the time of day in ticks;
* the extended BIOS data area, at the end of base memory: its size;
* the reset vector with the date and the machine's model behind it.  Its code resets the machine
  by the keyboard's controller, else by port 0xCF9, and else halts.  It is the way of a guest that
  reboots "by BIOS";
* the settings of the interrupt controllers and of the timer.

Source: IBM PC AT Technical Reference, "BIOS" and "ROM BIOS Data Area"; its entry points are at the
addresses that its listing has, because programs came to rely on them.  The port 0xCF9 is that
of Intel's 82371SB ("Reset Control Register").
Not left: services (an INT returns at once), video memory.

Invariants: nothing lies in memory that `GuestMemory.ranges` calls usable, but for the first 0x500
bytes, which no loader gives away; no piece overlaps another's or any table.
"""

import struct
from typing import Final

from understudy.arch.memory_map import EXTENDED_BIOS_DATA, LEGACY_HOLE

SEGMENT: Final = 0xF000  # real-address mode; linear 0xF0000
POST, BOOTSTRAP, TIMER, ENDING, DUMMY, RESET = 0xE05B, 0xE6F2, 0xFEA5, 0xFF23, 0xFF53, 0xFFF0
ENDING_BOTH: Final = ENDING + 0x10  # as `ENDING`, for the slave's requests
DATE: Final = b"11/28/26"
MODEL_AT: Final = 0xFC

VECTORS: Final = 256
STARTING: Final = (0x18, 0x19)  # "ROM BASIC" and "Bootstrap": there is nothing to fall back to
MASTER, SLAVE = 0x08, 0x70  # the vectors of the first request of each controller
OF_PROGRAMS: Final = range(0x60, 0x67)  # "reserved for user program interrupts": zero

# The BIOS data area.
SERIAL_PORTS, EQUIPMENT, KEYBOARD_BUFFER, TICKS = 0x400, 0x410, 0x41A, 0x46C
EXTENDED_SEGMENT, BASE_KIB, BUFFER_BOUNDS = 0x40E, 0x413, 0x480
COPROCESSOR = 1 << 1  # of the equipment; bits 9 to 11 count the serial ports
EMPTY_BUFFER = struct.pack("<HH", 0x1E, 0x1E)  # head and tail, from 0x400 on

SETTINGS: Final = (
    (0x21, 0xFF), (0xA1, 0xFF),  # nobody hears that the timer's outputs rise
    (0x43, 0x36), (0x40, 0), (0x40, 0),  # counter 0, a square wave of 1193182/65536 Hz: 18.2 Hz
    (0x43, 0x54), (0x41, 18),  # counter 1, every 15 microseconds: refresh
    # ICW1 to ICW4, then the masks: the timer, the keyboard and the slave may interrupt.
    (0x20, 0x11), (0x21, MASTER), (0x21, 1 << 2), (0x21, 1), (0x21, 0xF8),
    (0xA0, 0x11), (0xA1, SLAVE), (0xA1, 2), (0xA1, 1), (0xA1, 0xFF),
)  # fmt: skip
"""What is written to which port, byte by byte, in this order."""

START_AGAIN: Final = bytes.fromhex(
    "fa"  # cli
    "b0fe e664"  # mov al, 0xfe; out 0x64, al: pulse the reset line of the keyboard's controller
    "baf90c"  # mov dx, 0xcf9
    "b002 ee"  # mov al, 2; out dx, al: a hard reset
    "b006 ee"  # mov al, 6; out dx, al: now
    "f4 ebfd"  # hlt; jmp to it
)
COUNT: Final = bytes.fromhex(
    "1e 50"  # push ds; push ax
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "8306 6c04 01 1106 6e04"  # add word [TICKS], 1; adc word [TICKS + 2], ax
    "833e 6e04 18 7212"  # 0x1800B0 ticks are a day: cmp word [TICKS + 2], 0x18; jb on
    "813e 6c04 b000 720a"  # cmp word [TICKS], 0xb0; jb on
    "a3 6c04 a3 6e04"  # mov [TICKS], ax; mov [TICKS + 2], ax
    "fe06 7004"  # inc byte [TICKS + 4]: midnight has passed
    "cd1c"  # on: int 0x1c, for whoever wants to know
    "b020 e620"  # mov al, 0x20; out 0x20, al: the end of the interrupt
    "58 1f cf"  # pop ax; pop ds; iret
)
END: Final = bytes.fromhex(
    "50 b020 e620 58 cf"
)  # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
END_BOTH: Final = bytes.fromhex("50 b020 e6a0 e620 58 cf")  # the slave's first
IRET: Final = b"\xcf"


def pieces(serial_ports: tuple[int, ...], ticks: int = 0) -> dict[int, bytes]:
    """All that is in memory, by gpa.  `ticks`: 18.2ths of a second since midnight."""
    base, end = SEGMENT << 4, EXTENDED_BIOS_DATA
    equipment = COPROCESSOR | len(serial_ports) << 9
    return {
        0: b"".join(_vector(number) for number in range(VECTORS)),
        SERIAL_PORTS: struct.pack(f"<{len(serial_ports)}H", *serial_ports),
        EXTENDED_SEGMENT: struct.pack("<H", end >> 4),
        EQUIPMENT: struct.pack("<H", equipment),
        BASE_KIB: struct.pack("<H", end >> 10),
        KEYBOARD_BUFFER: EMPTY_BUFFER,
        TICKS: struct.pack("<I", ticks),
        BUFFER_BOUNDS: struct.pack("<HH", 0x1E, 0x3E),
        end: bytes(((LEGACY_HOLE[0] - end) >> 10,)),
        base + POST: START_AGAIN,
        base + BOOTSTRAP: _jump(POST),
        base + TIMER: COUNT,
        base + ENDING: END,
        base + ENDING_BOTH: END_BOTH,
        base + DUMMY: IRET,
        base + RESET: _jump(POST) + DATE + bytes((0, MODEL_AT, 0)),
    }


def _vector(number: int) -> bytes:
    if number in OF_PROGRAMS:
        return bytes(4)
    if number == MASTER:
        offset = TIMER
    elif number in range(MASTER + 1, MASTER + 8):
        offset = ENDING
    elif number in range(SLAVE, SLAVE + 8):
        offset = ENDING_BOTH
    else:
        offset = BOOTSTRAP if number in STARTING else DUMMY
    return struct.pack("<HH", offset, SEGMENT)


def _jump(offset: int) -> bytes:
    """A far jump in real-address mode, to the segment of the BIOS."""
    return struct.pack("<BHH", 0xEA, offset, SEGMENT)
