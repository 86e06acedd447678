"""Every instruction on a device does what it does on RAM.

What: of each instruction with a memory operand some encodings, in 16, 32 and 64-bit code, with
operands inside the device, over its edges and between its pages; compared with the same on plain
RAM, which the processor executes alone: registers, flags, x87 and SSE state, memory, faults.
Source: SDM 2.
"""

import random

import pytest

from tests.matrix.device_machine import (
    CR0_FLAGS,
    PAGE,
    WINDOW,
    Machine,
    case_of,
    difference,
)
from tests.matrix.encodings import encodings
from understudy.arch.cr import CR0
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
                expected, result = plain.run(case), device.run(case)
                if expected["stop"][0] == StopKind.BUDGET:
                    continue  # it jumped to where there is no program
                if words := difference(result, expected):
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


ADD = bytes.fromhex("01 03")  # add [rbx],eax
LOAD = bytes.fromhex("8b 03")  # mov eax,[rbx]
STORE = bytes.fromhex("89 03")  # mov [rbx],eax
LOAD_16 = bytes.fromhex("0f 10 03")  # movups xmm0,[rbx]
MULTIPLY = bytes.fromhex("f7 23")  # mul dword [rbx]


@pytest.mark.parametrize(
    ("code", "offset", "log"),
    [
        (LOAD, PAGE - 1, [("read", 0, 2), ("read", 2, 1)]),  # three bytes of the device
        (LOAD, 3 * PAGE - 2, [("read", 2 * PAGE - 2, 2)]),  # it ends in RAM
        (LOAD, 2 * PAGE - 2, [("read", PAGE - 2, 2), ("read", PAGE, 2)]),  # two device pages
        (STORE, PAGE - 2, [("write", 0, 2)]),
        (STORE, 3 * PAGE - 3, [("write", 2 * PAGE - 3, 1), ("write", 2 * PAGE - 2, 2)]),
        (ADD, PAGE - 2, [("read", 0, 2), ("write", 0, 2)]),
        (ADD, 2 * PAGE - 2, [("read", PAGE - 2, 2), ("read", PAGE, 2),
                             ("write", PAGE - 2, 2), ("write", PAGE, 2)]),
        (LOAD_16, PAGE + 64, [("read", 64, 8), ("read", 72, 8)]),
        (MULTIPLY, PAGE + 8, [("read", 8, 4)]),
        (LOAD, PAGE, [("read", 0, 4)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_device_sees_each_byte_once(
    paging: str, code: bytes, offset: int, log: list[tuple[str, int, int]]
) -> None:
    case = case_of(code, 64, random.Random(SEED), offset=offset)
    device, plain = (Machine(paging, 64, is_device=kind) for kind in (True, False))
    with device.vm, plain.vm:
        assert difference(device.run(case), plain.run(case)) == ""
        assert device.log == log


@pytest.mark.parametrize("code", [LOAD, STORE, ADD, LOAD_16, MULTIPLY])
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_fault_of_the_second_page_comes_before_the_device_is_asked(
    paging: str, code: bytes
) -> None:
    """The device's second page is not mapped: #PF with its first byte in CR2."""
    case = case_of(code, 64, random.Random(SEED), offset=2 * PAGE - 2)
    device, plain = (Machine(paging, 64, is_device=kind) for kind in (True, False))
    with device.vm, plain.vm:
        for machine in (device, plain):
            machine.tables.write(machine.tables.entry(WINDOW + 2 * PAGE), 0)
        result = device.run(case)
        assert difference(result, plain.run(case)) == ""
        assert result["registers"]["cr2"] == WINDOW + 2 * PAGE
        assert device.log == []


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_device_is_not_read_for_an_instruction_that_needs_the_fpu_back(paging: str) -> None:
    """With CR0.TS set: #NM, and the device is asked when the instruction comes again."""
    case = case_of(LOAD_16, 64, random.Random(SEED), offset=PAGE + 64)
    case.registers["cr0"] = CR0_FLAGS | CR0.TS.mask
    device, plain = (Machine(paging, 64, is_device=kind) for kind in (True, False))
    with device.vm, plain.vm:
        assert difference(device.run(case), plain.run(case)) == ""
        assert device.log == []


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize("bits", BITS)
def test_strings_between_memory_and_devices(paging: str, bits: int) -> None:
    """REP of each, both ways, over the edges, and with faults on the way."""
    rng = random.Random(SEED)
    device, plain = (Machine(paging, bits, is_device=kind) for kind in (True, False))
    base = 0 if bits == 16 else WINDOW
    wide = [b"\x48"] if bits == 64 else []
    with device.vm, plain.vm:
        for opcode in (0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF):
            for size in [b"", b"\x66", *wide]:
                for repeat in (b"", b"\xf2", b"\xf3"):
                    code = repeat + size + bytes([opcode])
                    case = case_of(code, bits, rng)
                    edges = (PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE)
                    case.registers["rsi"] = base + rng.choice(edges) - rng.randrange(40)
                    case.registers["rdi"] = base + rng.choice(edges) - rng.randrange(40)
                    case.registers["rcx"] = rng.choice((0, 1, 7, 64))
                    if rng.random() < 0.3:
                        case.memory = bytes(4 * PAGE)  # equal elements
                    words = difference(device.run(case), plain.run(case))
                    assert words == "", f"{code.hex(' ')} {case.registers}"
