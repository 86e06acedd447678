"""memtest86+, entered at its 64-bit and at its 32-bit entry: its first tests find no error.

What: the lines that it draws on the serial port, by which it says what it tests and what it found.
Source: the package's own screen.  Invariant: the number of instructions is bounded.
"""

import re

import pytest

from tests.guests.fetched import fetched
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import loader
from understudy.linux import VM
from understudy.verdict import StopKind

pytestmark = pytest.mark.real_guest

MEMORY = "16M"
INSTRUCTIONS = 8_000_000_000
SLICE = 250_000_000
LATER = 4  # once this test runs, those before it have passed
ENTER = b"\r"  # ends the five seconds in which it can be configured


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("memtest86+", "linux-64"),
        ("memtest86+", "linux-32"),
        pytest.param("memtest86+ia32", "linux-32", marks=pytest.mark.slow),
    ],
)
def test_its_first_tests_pass(name: str, method: str) -> None:
    guest = fetched(name)
    with VM(MEMORY) as vm:
        entry = loader.load(
            vm.memory, guest.kernel, append=guest.append, rsdp=RSDP_GPA, method=method
        )
        vm.enter(entry)
        vm.send(ENTER)
        seen: dict[int, str] = {}
        while max(seen, default=0) < LATER:
            assert vm.instructions < INSTRUCTIONS, f"it tested only {seen}"
            stop = vm.go(budget=SLICE, wall_seconds=200)
            assert stop.kind == StopKind.BUDGET, stop
            tests = re.findall(r"#(\d+) {1,2}\[([^]]+)\]", vm.console_text)
            seen = {int(number): name for number, name in tests}
        assert seen[0].startswith("Address test, walking ones"), seen
        assert re.search(r"memtest86\+|Memtest86\+", vm.console_text, re.I)
        found = re.findall(r"Errors: *(\d+)", vm.console_text)
        assert found and set(found) == {"0"}
        assert "Testing" in vm.console_text
