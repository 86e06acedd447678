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
    # guest: the last it says, and most instructions
    "xen": (b"Run /init as init process", 12_000_000_000),
    "u-boot": (b"\n=> ", 8_000_000_000),
    "u-boot-64": (b"\n=> ", 8_000_000_000),
    "gnumach": (b"No bootstrap code loaded", 8_000_000_000),
}
ASKED, KEY = b"Hit any key to stop autoboot", b" "


@pytest.mark.parametrize("name", CASES)
def test_says_its_last_word(name: str) -> None:
    fetched(name)
    last, most = CASES[name]
    with VM.linux(name, memory="512M") as vm:
        said = bytearray()
        vm.console.on_output.append(said.extend)
        stop = vm.go(budget=most, until=lambda: last in said[-200:] or said[-60:].find(ASKED) >= 0)
        if ASKED in said:
            vm.send(KEY)
            stop = vm.go(budget=most, until=lambda: last in said[-200:])
        assert stop.kind is StopKind.UNTIL, f"{stop}\n{said[-3000:].decode(errors='replace')}"
