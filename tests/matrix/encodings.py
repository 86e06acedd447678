"""Encodings of every instruction with a memory operand, found by trying bytes.

What: opcode maps by prefixes by ModRM, through the decoder; of each code of iced-x86 the encodings
that were met.  VEX, EVEX and XOP, which no processor here has, are left out.
Source: SDM 2, "Instruction Format".  Invariant: the same seed gives the same encodings.
"""

import random

import iced_x86 as iced
from iced_x86 import OpKind

PREFIXES = (b"", b"\x66", b"\xf2", b"\xf3", b"\x67")
MAPS = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
REX = (b"", b"\x48", b"\x44")
RM = {16: 7, 32: 3, 64: 3}  # [BX], [EBX], [RBX]
MEMORY = frozenset(getattr(OpKind, name) for name in dir(OpKind) if name.startswith("MEMORY"))


def has_memory(instruction: iced.Instruction) -> bool:
    """An operand of it is memory, named or implied."""
    return any(instruction.op_kind(n) in MEMORY for n in range(instruction.op_count))


def encodings(bits: int, seed: int) -> dict[int, list[bytes]]:
    """By code."""
    rng = random.Random(seed)
    found: dict[int, list[bytes]] = {}
    for prefix in PREFIXES:
        for rex in REX if bits == 64 else (b"",):
            for map_ in MAPS:
                for opcode in range(256):
                    for reg in range(8):
                        rm = RM[bits] if prefix != b"\x67" or bits == 64 else {16: 3, 32: 7}[bits]
                        form = bytes([opcode, reg << 3 | rm])
                        code = prefix + rex + map_ + form + rng.randbytes(12)
                        made = iced.Decoder(bits, code[:15]).decode()
                        if made.code == iced.Code.INVALID or not has_memory(made):
                            continue
                        if made.encoding != iced.EncodingKind.LEGACY:
                            continue
                        found.setdefault(made.code, []).append(code[: made.len])
    return found
