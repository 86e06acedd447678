"""What is not a Linux: a hypervisor with its first domain, firmware, a microkernel.

Source: what each says last when it runs on a PC (QEMU).  Skipped, with the reason, where one cannot
be had.  Invariant: the number of instructions is bounded.
"""

import pytest

from tests.guests.fetched import fetched
from understudy.linux import VM
from understudy.verdict import StopKind

pytestmark = [pytest.mark.real_guest, pytest.mark.slow]

CASES = {
    # guest: the last it says, most instructions, engines
    "xen": (b"Run /init as init process", 9_000_000_000, ("dbt",)),
    "u-boot": (b"\n=> ", 20_000_000_000, ("dbt",)),
    "u-boot-64": (b"\n=> ", 20_000_000_000, ("dbt",)),
    "gnumach": (b"panic: No bootstrap code loaded", 1_000_000_000, ("dbt", "reference")),
}


@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, case in CASES.items() for engine in case[2]]
)
def test_says_its_last_word(name: str, engine: str) -> None:
    fetched(name)
    last, most, _ = CASES[name]
    with VM.linux(name, memory="512M", engine=engine) as vm:
        said = bytearray()
        vm.console.on_output.append(said.extend)
        stop = vm.go(budget=most, until=lambda: last in said[-200:])
        assert stop.kind is StopKind.UNTIL, f"{stop}\n{said[-3000:].decode(errors='replace')}"
