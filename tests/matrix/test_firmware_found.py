"""What firmware leaves is found by those who look for it: Debian's kernels.

Source: Linux, Documentation/admin-guide/kernel-parameters.txt, "acpi=off"; the cloud kernel has no
code for MultiProcessor tables.  Invariant: none.
"""

import pytest

from tests.guests.fetched import fetched
from understudy.linux import VM

pytestmark = pytest.mark.real_guest


def booted(name: str, append: str) -> str:
    fetched(name)
    with VM.linux(name, memory="256M", append=append) as vm:
        vm.wait_for_prompt()
        return vm.console_text


@pytest.mark.slow
def test_without_acpi_the_apics_are_found_by_the_multiprocessor_table() -> None:
    text = booted("amd64", "acpi=off")
    assert "DMI: understudy PC, BIOS 1 11/28/2026" in text
    assert "MPTABLE: OEM ID: UNDRSTDY" in text
    assert "IOAPIC[0]: apic_id 1, version 32, address 0xfec00000, GSI 0-23" in text
    assert "APIC: Switch to symmetric I/O mode setup" in text


@pytest.mark.slow
def test_without_acpi_and_apics_the_8259s_and_the_timer_do() -> None:
    text = booted("cloud-amd64", "acpi=off")
    assert "SMBIOS 3.0.0 present." in text
    assert "APIC: Keep in PIC mode(8259)" in text
