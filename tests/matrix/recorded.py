"""Single instructions in real-address mode, as somebody recorded them of a processor.

Each row of the file is JSON: `f` the form, `n` the instruction in words, `b` its bytes and a HLT,
`i` [registers, [[address, byte], ...]] before, `o` what has changed after the HLT, `x` the vector
of its exception.  (`u`, flags that whoever recorded it found undefined, is not looked at.)
Source: whoever recorded it; SDM 2, "Flags Affected" of each instruction, for what is undefined.
Invariant: only rows whose memory is RAM in a PC are run.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.tree import ROOT
from understudy.vcpu.activity import Activity
from understudy.vm import VM

BESIDE: Final = ROOT.parent / "shared/data/real-mode-vectors.jsonl.gz"
VECTORS: Final = Path(os.environ.get("UNDERSTUDY_VECTORS", BESIDE))
MISSING: Final = (
    f"no recording: {VECTORS}; UNDERSTUDY_VECTORS names another (gzipped rows as in "
    "tests/matrix/recorded.py, made for example of SingleStepTests' for the 80286)"
)
HOLE: Final = range(0x9_F000, 0x10_0000)
NAMES: Final = {"ip": "rip", "flags": "rflags"} | {
    name: "r" + name for name in ("ax", "bx", "cx", "dx", "sp", "bp", "si", "di")
}  # fmt: skip
SEGMENTS: Final = ("cs", "ss", "ds", "es")
FLAGS: Final = 0xFD5  # that the processor of the recording has, too
MOST: Final = 40  # instructions, with a handler's

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
LOGIC: Final = (
    "08 09 0A 0B 0C 0D 20 21 22 23 24 25 30 31 32 33 34 35 84 85 A8 A9 F6.0 F6.1 F7.0 F7.1 "
    "80.1 80.4 80.6 81.1 81.4 81.6 82.1 82.4 82.6 83.1 83.4 83.6"
)
UNDEFINED: Final = {
    form: flags
    for forms, flags in (
        (LOGIC, AF),
        ("27 2F", OF),  # DAA, DAS
        ("37 3F", OF | SF | ZF | PF),  # AAA, AAS
        ("D4 D5", OF | AF | CF),  # AAM, AAD
        ("69 6B F6.4 F6.5 F7.4 F7.5", SF | ZF | AF | PF),  # MUL, IMUL
        ("F6.6 F6.7 F7.6 F7.7", CF | OF | SF | ZF | AF | PF),  # DIV, IDIV
    )
    for form in forms.split()
}
"""By form; of shifts and rotations it depends on the count."""
SHIFTS: Final = ("C0", "C1", "D0", "D1", "D2", "D3")
ROTATIONS, SAR = "0123", "7"


def undefined(row: dict[str, Any]) -> int:
    """Flags that the manual leaves undefined after the row's instruction."""
    opcode, _, extension = row["f"].partition(".")
    if opcode not in SHIFTS:
        return UNDEFINED.get(row["f"], 0)
    counts = {"C": bytes.fromhex(row["b"])[-2], "D": row["i"][0]["cx"] & 0xFF}
    count = 1 if opcode in ("D0", "D1") else counts[opcode[0]] & 31
    flags = OF if count > 1 else 0
    if extension not in ROTATIONS and count:
        flags |= AF
        if extension != SAR and count >= (16 if int(opcode, 16) & 1 else 8):
            flags |= CF
    return flags


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Those that can be run."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            if not any(at in HOLE for at, _ in [*row["i"][1], *row["o"][1]]):
                yield row


def outcome(vm: VM, row: dict[str, Any]) -> tuple[dict[str, int], dict[int, int]]:
    """The registers and the bytes that the row speaks of, after it was run."""
    vcpu = vm.vcpus[0]
    before, memory = row["i"]
    for at, byte in memory:
        vm.memory.write(at, bytes((byte,)))
    registers = {NAMES.get(name, name): value for name, value in before.items()}
    registers["rflags"] = registers["rflags"] & FLAGS | 2
    vcpu.guest.end_shadow()
    vcpu.guest.unblock_nmis()
    vcpu.state.activity = Activity.ACTIVE
    vcpu.guest.set_registers(registers | {"cr0": 0x10, "idtr_limit": 0x3FF})
    vm.go(budget=MOST, until=lambda: vcpu.state.activity is Activity.HLT)
    now = vcpu.registers()
    values = {name: now[NAMES.get(name, name)] & 0xFFFF for name in before}
    return values, {at: vm.memory.read(at, 1)[0] for at, _ in row["o"][1]}


def expected(row: dict[str, Any]) -> tuple[dict[str, int], dict[int, int]]:
    """What the recording says of the same."""
    return row["i"][0] | row["o"][0], dict(map(tuple, row["o"][1]))


def differs(row: dict[str, Any], found: tuple[dict[str, int], dict[int, int]]) -> list[str]:
    """In words, but for flags that are undefined or that other processors have."""
    wanted, shown = expected(row), FLAGS & ~undefined(row)
    lines = []
    for name, value in wanted[0].items():
        mask = shown if name == "flags" else 0xFFFF
        if (value ^ found[0][name]) & mask:
            lines.append(f"{name}: {found[0][name]:#x}, recorded {value:#x}")
    for at, byte in wanted[1].items():
        if byte != found[1][at]:
            lines.append(f"[{at:#x}]: {found[1][at]:#x}, recorded {byte:#x}")
    return lines
