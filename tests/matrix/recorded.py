"""Single instructions in real-address mode, as somebody recorded them of a processor.

Each row of the file is JSON: `f` the form, `n` the instruction in words, `b` its bytes and a HLT,
`i` [registers, [[address, byte], ...]] before, `o` what has changed after the HLT, `x` the vector
of its exception, `u` flags that are undefined.
Source: whoever recorded it.  Invariant: only rows whose memory is RAM in a PC are run.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from understudy.vcpu.activity import Activity
from understudy.vm import VM

HOLE: Final = range(0x9_F000, 0x10_0000)
NAMES: Final = {"ip": "rip", "flags": "rflags"} | {
    name: "r" + name for name in ("ax", "bx", "cx", "dx", "sp", "bp", "si", "di")
}  # fmt: skip
SEGMENTS: Final = ("cs", "ss", "ds", "es")
FLAGS: Final = 0xFD5  # that the processor of the recording has, too
MOST: Final = 40  # instructions, with a handler's


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
    wanted, shown = expected(row), FLAGS & ~row["u"]
    lines = []
    for name, value in wanted[0].items():
        mask = shown if name == "flags" else 0xFFFF
        if (value ^ found[0][name]) & mask:
            lines.append(f"{name}: {found[0][name]:#x}, recorded {value:#x}")
    for at, byte in wanted[1].items():
        if byte != found[1][at]:
            lines.append(f"[{at:#x}]: {found[1][at]:#x}, recorded {byte:#x}")
    return lines
