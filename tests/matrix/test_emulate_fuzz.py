"""The interpreter and the processor make the same of random instructions, of every width.

What: pieces of `instruction_fuzz`, a few here and many by `make fuzz-emulate`.
Source: SDM 2.  Invariant: what the interpreter carries out itself is most of it.
"""

import os
import random

import pytest

from tests.matrix.instruction_fuzz import (
    FLAT32,
    LONG,
    MODES,
    PROTECTED16,
    SEGMENTED32,
    SIZE,
    WINDOW,
    Piece,
    Twins,
    fuzz,
    state,
)  # fmt: skip

PIECES = int(os.environ.get("FUZZ_PIECES", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.parametrize("mode", MODES)
def test_random_instructions(mode: str) -> None:
    interpreted, handed_over = fuzz(mode, PIECES, SEED)
    print(f"{mode}: {interpreted} interpreted, handed over {handed_over.most_common(30)}")
    assert interpreted > 4 * PIECES
    assert handed_over.total() < interpreted


def test_a_repeated_instruction_under_the_monitor_trap_flag() -> None:
    """What is handed over of it is one iteration: with TF, each ends in a trap (POPF, REPNE SCASW).

    SDM 3C, "Monitor Trap Flag": the exit is "on the instruction boundary following that iteration".
    """
    registers = state(random.Random(1), PROTECTED16) | {"rcx": 27, "rsp": 0x8000, "rdi": 0x7000}
    window = bytes(0x8000) + b"\x02\x01" + bytes(SIZE - 0x8002)  # TF, and the flag that is always 1
    piece = Piece(PROTECTED16, bytes.fromhex("9d f2 af 90"), registers, window)
    twins = Twins(PROTECTED16)
    try:
        for budget in range(1, 5):
            assert not twins.run(piece, budget)
        assert twins.vms[0].vcpus[0].registers()["rcx"] == 26
    finally:
        twins.close()


def test_code_that_writes_the_next_instruction() -> None:
    """MOV BYTE [rip+1], 7 over the immediate of MOV AL, 1 behind it; twice, so it was decoded."""
    code = bytes.fromhex("b9 02 00 00 00 | c6 05 01 00 00 00 07 | b0 01 | fe 05 f8 ff ff ff | e2 ef"
                         .replace("|", ""))  # fmt: skip
    registers = state(random.Random(1), LONG) | {"cr0": 0x8000_0011}  # WP is off: code is written
    piece, twins = Piece(LONG, code, registers, bytes(SIZE)), Twins(LONG)
    try:
        for budget in range(1, 10):
            assert not twins.run(piece, budget)
        assert twins.vms[0].vcpus[0].registers()["rax"] & 0xFF == 7
    finally:
        twins.close()


@pytest.mark.parametrize(
    ("mode", "code", "registers"),
    [
        (PROTECTED16, "8e d0 50 50", {"rax": 0x10, "rsp": 0}),  # mov ss, ax; push ax; push ax
        (FLAT32, "c8 00 80 00", {"rsp": 0x2000}),  # enter 0x8000, 0
        (FLAT32, "c8 00 00 03 c9 c9", {"rbp": WINDOW + 0x100}),  # enter 0, 3; leave; leave
        (SEGMENTED32, "c8 fe ee f5", {"rsp": 0x75F2, "rbp": 0x75DA}),  # enter 0xeefe, 0xf5
        (LONG, "0f b1 cb", {"rax": 1, "rbx": (1 << 64) - 1}),  # cmpxchg ebx, ecx
        (LONG, "48 0f c1 dc", {}),  # xadd rsp, rbx
        (LONG, "90 0f 31 90 f3 90 0f 01 f9", {}),  # nop; rdtsc; nop; pause; rdtscp
    ],
    ids=[
        "stack of 32 bits in the shadow",
        "enter faults",
        "nested",
        "nested faults",
        "cmpxchg fails",
        "xadd",
        "time",
    ],
)
def test_one_after_the_other(mode: str, code: str, registers: dict[str, int]) -> None:
    rng = random.Random(1)
    begin, window = state(rng, mode) | registers, rng.randbytes(SIZE)
    piece, twins = Piece(mode, bytes.fromhex(code), begin, window), Twins(mode)
    try:
        for budget in range(1, 6):
            assert not twins.run(piece, budget)
    finally:
        twins.close()
