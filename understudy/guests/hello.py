"""hello: the built-in guest, a few instructions that print a line and power the machine off.

Needs neither network nor package client, so a first run always works.  It is an ELF file entered
like a vmlinux in 64-bit mode.  It polls the 16550 on COM1 and switches off by SLP_EN in the
ACPI PM1a control register, at the port where understudy's FADT has it.
The bytes below mean what is written beside them: a test disassembles them.
"""

import struct

DESCRIPTION = "built in: prints one line on the serial port and powers off"
MESSAGE = b"Hello from a guest of understudy.\r\n"

CODE_GPA = 0x10_0000  # where the program is loaded and entered
ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES = 64, 56

# fmt: off
PROGRAM = (
    # for each byte of the message
    ("be 3c 00 10 00", "mov esi,10003Ch"),       # the message follows the program
    ("0f b6 0e",       "movzx ecx,byte ptr [rsi]"),
    ("85 c9",          "test ecx,ecx"),
    ("74 16",          "je short 0000000000100022h"),
    # wait until the line status register says that it may be written (THRE)
    ("ba fd 03 00 00", "mov edx,3FDh"),
    ("ec",             "in al,dx"),
    ("a8 20",          "test al,20h"),
    ("74 fb",          "je short 0000000000100011h"),
    ("ba f8 03 00 00", "mov edx,3F8h"),
    ("89 c8",          "mov eax,ecx"),
    ("ee",             "out dx,al"),
    ("ff c6",          "inc esi"),
    ("eb e3",          "jmp short 0000000000100005h"),
    # wait until all is sent (TEMT)
    ("ba fd 03 00 00", "mov edx,3FDh"),
    ("ec",             "in al,dx"),
    ("a8 40",          "test al,40h"),
    ("74 fb",          "je short 0000000000100027h"),
    # power off: SLP_EN, SLP_TYP of S5
    ("ba 04 06 00 00", "mov edx,604h"),
    ("b8 00 34 00 00", "mov eax,3400h"),
    ("66 ef",          "out dx,ax"),
    # should that not be heard, stop for good
    ("fa",             "cli"),
    ("f4",             "hlt"),
    ("eb fc",          "jmp short 0000000000100038h"),
)
# fmt: on


def code() -> bytes:
    """The program and its message, as they stand at CODE_GPA."""
    return b"".join(bytes.fromhex(row) for row, _ in PROGRAM) + MESSAGE + b"\0"


def image() -> bytes:
    """The guest as an ELF file for x86-64."""
    body = code()
    offset = ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64-bit, little-endian, version 1
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH",
        2,  # executable
        62,  # x86-64
        1,
        CODE_GPA,
        ELF_HEADER_BYTES,
        0,
        0,
        ELF_HEADER_BYTES,
        PROGRAM_HEADER_BYTES,
        1,
        0,
        0,
        0,
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, offset, CODE_GPA, CODE_GPA, len(body), len(body), 4096)
    return header + segment + body
