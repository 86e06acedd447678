"""Debian's kernels, unmodified: to init, one command, power-off.

Source: what each package's own version says.  Skipped, with the reason, where one cannot be had.
"""

import re

import pytest

from tests.guests.fetched import KERNELS, fetched
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import loader
from understudy.guests.entry import GuestError
from understudy.linux import VM, GuestStopped
from understudy.verdict import StopKind

pytestmark = pytest.mark.real_guest

INSTRUCTIONS = 4_000_000_000  # a boot takes less than half of them
NOT_AFFECTED = ("meltdown", "mds", "l1tf", "retbleed", "tsx_async_abort", "srbds")
# What the kernel says when our processor, tables or devices are not as it wants them.
COMPLAINTS = (
    "Marking clocksource", "unstable", "ACPI Error", "ACPI BIOS", "ACPI Warning", "FW_BUG",
    "Firmware Bug", "unchecked MSR", "WARNING:", "BUG:", "Oops", "Call Trace", "spurious",
    "nobody cared", "MP-BIOS bug", "calibration failed", "lockup", "No PS/2 controller",
)  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_boots_runs_a_command_and_powers_off(name: str) -> None:
    guest = fetched(name)
    series, _, flavour = guest.version.partition(".")
    with VM.linux(name, memory="256M") as vm:
        release = vm.run("uname -r").check().output.strip()
        assert release.startswith(f"{series}.{flavour.split('.')[0]}."), (release, guest.version)
        assert release.endswith("-" + name.removesuffix("-6.12"))
        where = "/sys/devices/system/cpu/vulnerabilities"
        for weakness in NOT_AFFECTED:
            assert vm.run(f"cat {where}/{weakness}").output == "Not affected\n", weakness
        spectre = vm.run(f"cat {where}/spectre_v2").output
        assert "Retpoline" not in spectre and "IBRS" in spectre
        log = vm.run("dmesg").output
        met = [line for line in log.splitlines() if any(word in line for word in COMPLAINTS)]
        assert met == []
        assert "random: crng init done" in log  # by the seed: nothing has asked for any yet
        vm.power_off()
        assert vm.counts()["instructions"] < INSTRUCTIONS


@pytest.mark.parametrize("name", KERNELS)
def test_the_memory_that_an_error_advises_is_enough(name: str) -> None:
    fetched(name)
    with pytest.raises(GuestError) as refused:
        VM.linux(name, memory="16M")
    advised = re.search(r": try (\d+M)$", str(refused.value))
    assert advised is not None, str(refused.value)
    with VM.linux(name, memory=advised[1]) as vm:
        assert vm.run("echo enough").output == "enough\n"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cloud-amd64", "linux-64"),
        ("cloud-amd64", "linux-32"),
        ("cloud-amd64", "pvh"),
        pytest.param("686", "linux-32", marks=pytest.mark.slow),
        ("686-pae", "pvh"),
    ],
)
def test_every_other_entry_of_the_same_file(name: str, method: str) -> None:
    """With the kernel's own decompressor in the guest, and by its PVH note."""
    guest = fetched(name)
    with VM("512M") as vm:
        entry = loader.load(
            vm.memory,
            guest.kernel,
            initrd=guest.initrd,
            append=guest.append,
            rsdp=RSDP_GPA,
            method=method,
        )
        vm.enter(entry)
        assert vm.run("uname -r").check().output.startswith("6.1.")
        vm.power_off()


def test_a_guest_that_powers_itself_off_ends_so() -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", memory="128M") as vm, pytest.raises(GuestStopped) as stopped:
        vm.run("poweroff -f")
    assert stopped.value.stop.kind == StopKind.POWEROFF
