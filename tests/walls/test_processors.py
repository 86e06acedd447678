"""What processors can make wait for one another.

What: one of two sends messages of each kind as fast as it can, to a processor that is offline,
halts or runs; what waits for the other is looked at after every few instructions.
Source: SDM 3A, "Interrupt Command Register (ICR)"; "Multiple-Processor (MP) Initialization".
"""

import struct

import pytest

from understudy.guests.entry import protected_mode
from understudy.vcpu import loop
from understudy.vm import VM

CODE, START_UP = 0x1000, 0x8000
INIT, SIPI, NMI, FIXED = 0x4500, 0x4600 | START_UP >> 12, 0x4400, 0x4040
OTHERS = 0xC0000  # all but the sender
STORMS = {
    "INIT": [INIT], "start-up": [SIPI], "NMI": [NMI], "vector": [FIXED],
    "INIT and start-up": [INIT, SIPI, SIPI], "to all others": [INIT | OTHERS, SIPI | OTHERS],
}  # fmt: skip
OTHER = {"halts": b"\xfa\xf4", "runs": b"\xeb\xfe"}  # in real mode, at the start-up page


def storm(messages: list[int]) -> bytes:
    """Write these to the interrupt command register, for processor 1, for ever."""
    code = b"\xbf" + struct.pack("<I", 0xFEE00300)  # mov edi, the register
    code += b"\xc7\x47\x10" + struct.pack("<I", 1 << 24)
    again = b"".join(b"\xc7\x07" + struct.pack("<I", message) for message in messages)
    return code + again + b"\xeb" + bytes([256 - len(again) - 2])


CASES = [(name, other, "virtual") for name in STORMS for other in OTHER]
CASES += [("INIT and start-up", "runs", "wall")]


@pytest.mark.parametrize(("name", "other", "clock"), CASES)
def test_messages_do_not_pile_up(name: str, other: str, clock: str) -> None:
    with VM("2M", cpus=2, clock=clock) as vm:
        vm.memory.write(CODE, storm(STORMS[name]))
        vm.memory.write(START_UP, OTHER[other])
        vm.enter(protected_mode("storm", CODE))
        most = 0
        for _ in range(10):
            vm.go(budget=500, wall_seconds=2)
            most = max(most, *(len(vcpu.commands) for vcpu in vm.vcpus))
        assert most <= loop.COMMANDS_KEPT
        assert sum(vcpu.retired for vcpu in vm.vcpus) > 500
