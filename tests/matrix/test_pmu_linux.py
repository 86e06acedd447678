"""Linux's perf events on the counters: found at boot, counted exactly, interrupted, read by a user.

Source: perf_event_open(2), which tells how a program reads a counter with RDPMC itself.
"""

import base64
import re

import pytest

from tests.matrix.lockstep import linux
from understudy.guests import agent_program
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

ATTRIBUTES = (
    "00000000 40000000 0100000000000000"  # hardware event, size, instructions
    "{period:016x} 0000000000000000 0000000000000000 6000000000000000"  # not of the kernel
    "0000000000000000 0000000000000000"
)
COUNT = (
    # perf_event_open(&attr, 0, -1, -1, 0)
    "b850010000 bbc0800408 31c9 baffffffff beffffffff 31ff cd80"
    "89c7 b8c0000000 31db b900100000 ba01000000 be01000000 31ed cd80"  # mmap2: its page
    "8b580c 4b 89d9 0f33 89c6"  # ebx = page->index - 1; esi = rdpmc
    "b9{turns} 49 75fd"  # mov ecx, turns; loop: dec ecx; jnz loop
    "89d9 0f33 29f0"  # eax = rdpmc - esi
    "50 53 89e1 bb01000000 ba08000000 b804000000 cd80"  # write(1, {ebx, eax}, 8)
    "b801000000 31db cd80"  # exit(0)
)
AROUND = 4  # the first RDPMC, two MOVs before the loop, one after it
INSTRUCTIONS_COUNTER = 1 << 30  # for RDPMC: fixed counter 0


def counted(vm: VM, turns: int, period: int = 0) -> tuple[int, int]:
    """RDPMC's operand, and the instructions that a loop of two took."""
    of = period.to_bytes(8, "little").hex()
    code = COUNT.format(turns=turns.to_bytes(4, "little").hex())
    attributes = ATTRIBUTES.replace("{period:016x}", of)
    image = agent_program.image(bytes.fromhex(code + attributes))
    text = base64.b64encode(image).decode()
    raw = (
        vm.run(f"echo {text} | base64 -d >/tmp/count; chmod +x /tmp/count; /tmp/count").check().raw
    )
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")


def interrupts(vm: VM) -> int:
    """Performance-monitoring interrupts that Linux has taken."""
    found = re.search(r"PMI: +(\d+)", vm.run("cat /proc/interrupts").output)
    assert found is not None
    return int(found[1])


def test_linux_counts_with_the_processors_counters() -> None:
    with linux("dbt") as vm:
        log = vm.run("dmesg").output
        assert re.search(r"Performance Events: .*Intel PMU driver", log)
        for line in ("version:                2", "bit width:              48",
                     "generic registers:      4", "fixed-purpose events:   3"):  # fmt: skip
            assert line in log
        assert "unchecked MSR" not in log and "Broken BIOS" not in log
        assert counted(vm, 1000) == (INSTRUCTIONS_COUNTER, 2 * 1000 + AROUND)
        before = interrupts(vm)
        _, left = counted(vm, 50_000, period=10_000)
        taken = interrupts(vm) - before
        # At each interrupt Linux takes the counter back by a period; and each return by IRET to the
        # program counts there, as on hardware (also that from a tick of the clock).
        assert taken == 10
        assert left + taken * 10_000 - (2 * 50_000 + AROUND + taken) in (0, 1)
        vm.power_off()


def test_a_processor_without_counters_is_left_alone() -> None:
    with linux("dbt", cpu="understudy,-pmu") as vm:
        log = vm.run("dmesg").output
        assert "Performance Events: no PMU driver" in log or "software events only" in log
        assert "unchecked MSR" not in log
