"""Every instruction on a device does what it does on RAM.

What: of each instruction with a memory operand some encodings, in 16, 32 and 64-bit code, with
operands inside the device, over its edges and between its pages; compared with the same instruction on
plain RAM, which the processor executes alone: registers, flags, x87 and SSE state, memory, faults.
Source: SDM 2.
"""

import random

import pytest

from tests.matrix.device_machine import Machine, case_of, difference
from tests.matrix.encodings import encodings
from understudy.paging import Paging
from understudy.verdict import StopKind

SEED = 20_261
SAMPLE = 150  # instructions of each mode in the short test
BITS = (16, 32, 64)


def differences(paging: str, bits: int, count: int | None, rounds: int) -> list[str]:
    rng = random.Random(f"{SEED} {paging} {bits}")
    found = encodings(bits, SEED)
    codes = sorted(found)
    chosen = codes if count is None else rng.sample(codes, count)
    device, plain = (Machine(paging, bits, is_device=kind) for kind in (True, False))
    out = []
    with device.vm, plain.vm:
        for code in chosen:
            for _ in range(rounds):
                case = case_of(rng.choice(found[code]), bits, rng)
                expected = plain.run(case)
                if expected["stop"][0] == StopKind.BUDGET:
                    continue  # it jumped to where there is no program
                if words := difference(device.run(case), expected):
                    out.append(f"{case.code.hex(' ')} at rbx={case.registers['rbx']:#x}: {words}")
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_some_instructions(paging: str, bits: int) -> None:
    assert differences(paging, bits, SAMPLE // len(Paging.ALL), 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_all_instructions(paging: str, bits: int) -> None:
    assert differences(paging, bits, None, 4) == []
