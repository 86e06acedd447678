"""The agent's program for the guest, as an ELF file for Linux on i386.

Its source is agent.s, beside this file, which tells what it does; a test assembles it and compares.
`python -m tools.agent_program` puts the bytes here.

Source: System V ABI, Intel386 supplement, "Object Files".  Invariant: one segment, code and data.
"""

import struct
from typing import Final

LOADED_GVA: Final = 0x0804_8000
HEADERS_BYTES: Final = 52 + 32  # ELF header, one program header
CODE_GVA: Final = LOADED_GVA + HEADERS_BYTES
DATA_GVA: Final = LOADED_GVA + 0x1000
REQUEST_GVA: Final = LOADED_GVA + 0x2000  # where agent.s puts what it is told
REQUEST_BYTES: Final = 0x9_0000
SCRATCH_GVA: Final = REQUEST_GVA + REQUEST_BYTES  # for whoever reads something there
SCRATCH_BYTES: Final = 0x12_0000
MEMORY_BYTES: Final = SCRATCH_GVA + SCRATCH_BYTES - LOADED_GVA

CODE: Final = bytes.fromhex("""
    5b4b891d009004087424bba0050000b908000000ba01000000b865000000cd80
    85c00f856b010000baa4050000ef833d0090040800741c31dbb90c900408ba01
    000000b803000000cd8083f8010f8540010000bf00a00408be04000000e8d300
    0000bf00a004088b3500a00408e8c3000000c7050490040810a00408a100a004
    08a308900408ff0d0890040878658b2d04900408b9050000000fa34d04730a8b
    448d088b0089448d084979ed8b45008b5d088b4d0c8b55108b75148b7d188b6d
    1ccd808b2d049004088b4d008945008b55088305049004082083f90275a885c0
    74a4291508900408c1e205011504900408eb93be10a004088b0d04a00408e861
    0000008b3d00a00408c1e70581c710a004088b2d08a004084d0f880fffffff8b
    378b4f048b0983c70883f9007eeae831000000ebe3833d0090040800751c85f6
    742131db89f989f2b803000000cd8083f8007e3f01c729c6ebdb89f1baa00500
    00f36cc3833d0090040800751e85c974f289ca89f131dbb804000000cd8083f8
    007e1089d101c629c1ebd9baa0050000f36ec331dbb801000000cd80
""")


def image(code: bytes = CODE) -> bytes:
    """The program, as it stands in the guest's file system."""
    identity = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)  # 32-bit, little-endian, version 1
    executable, i386, readable_writable_executable = 2, 3, 7
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        identity, executable, i386, 1, CODE_GVA, 52, 0, 0, 52, 32, 1, 0, 0, 0,
    )  # fmt: skip
    size = HEADERS_BYTES + len(code)
    segment = struct.pack(
        "<8I",
        1, 0, LOADED_GVA, LOADED_GVA, size, MEMORY_BYTES, readable_writable_executable, 0x1000,
    )  # fmt: skip
    return header + segment + code
