"""Each processor of a VM has counters of its own, in virtual time and in real time.

What: two processors, one in protected and one in real-address mode, each count their own
instructions while both run.
Source: SDM 3B, "Architectural Performance Monitoring Version 2".
"""

import struct

import pytest

from understudy.guests.entry import protected_mode
from understudy.paging import Paging
from understudy.vm import VM

CODE, START_UP = 0x1000, 0x8000
FIXED_CTR_CTRL, GLOBAL_CTRL, INSTRUCTIONS = 0x38D, 0x38F, 0x309
ON_ALL_LEVELS, FIXED_0 = 3, 1  # of the first register, and of the high half of the second


def wrmsr(index: int, low: int, high: int, prefix: bytes) -> bytes:
    """Write an MSR by immediate values."""
    words = zip(b"\xb9\xb8\xba", (index, low, high), strict=True)  # ecx, eax, edx
    return (
        b"".join(prefix + bytes([op]) + struct.pack("<I", word) for op, word in words) + b"\x0f\x30"
    )


def counting(prefix: bytes) -> bytes:
    """Count, from the instruction after this."""
    control = wrmsr(FIXED_CTR_CTRL, ON_ALL_LEVELS, 0, prefix)
    return control + wrmsr(GLOBAL_CTRL, 0, FIXED_0, prefix)


FIRST = counting(b"") + (
    b"\xbf" + struct.pack("<I", 0xFEE00300)  # mov edi, the interrupt command register
    + b"\xc7\x47\x10" + struct.pack("<I", 1 << 24)
    + b"\xc7\x07" + struct.pack("<I", 0x4500)
    + b"\xc7\x07" + struct.pack("<I", 0x4600 | START_UP >> 12)
    + b"\xeb\xfe"
)  # fmt: skip
SECOND = counting(b"\x66") + b"\xeb\xfe"
BEFORE = 7  # instructions up to the WRMSR that begins, which counts already
EXITS = (5, 2)  # instructions that retire nowhere: two WRMSR each, and those on the APIC


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_each_counts_its_own(paging: str, clock: str) -> None:
    with VM("2M", cpus=2, clock=clock, paging=paging) as vm:
        vm.memory.write(CODE, FIRST)
        vm.memory.write(START_UP, SECOND)
        vm.enter(protected_mode("counts", CODE))
        for _ in range(20):
            vm.go(budget=40_000, wall_seconds=10)
            if min(vcpu.retired for vcpu in vm.vcpus) > 50_000:
                break
        for vcpu, exits in zip(vm.vcpus, EXITS, strict=True):
            assert vcpu.retired > 50_000
            assert vcpu.msrs.read(INSTRUCTIONS) == vcpu.retired + exits - BEFORE
