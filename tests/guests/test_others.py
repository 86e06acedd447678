"""What is not a Linux: a hypervisor with its first domain, firmware, a microkernel.

Source: what each says last when it runs on a PC (QEMU).  Skipped, with the reason, where one cannot
be had.  Invariant: the number of instructions is bounded.
"""

from typing import NamedTuple

import pytest

from tests.guests.fetched import fetched
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import loader, packages
from understudy.guests.entry import GuestError
from understudy.linux import VM
from understudy.verdict import StopKind

pytestmark = [pytest.mark.real_guest, pytest.mark.slow]

MOST = 12_000_000_000  # instructions
LAST = {
    "xen": b"Run /init as init process",
    "u-boot": b"\n=> ",
    "u-boot-64": b"\n=> ",
    "gnumach": b"No bootstrap code loaded",
}
ASKED, KEY = b"Hit any key to stop autoboot", b" "


class Ran(NamedTuple):
    """What a run came to."""

    instructions: int
    said: bytes


def to_its_last_word(vm: VM, last: bytes) -> Ran:
    said = bytearray()
    vm.console.on_output.append(said.extend)
    stop = vm.go(budget=MOST, until=lambda: last in said[-200:] or ASKED in said[-60:])
    if ASKED in said:
        vm.send(KEY)
        stop = vm.go(budget=MOST, until=lambda: last in said[-200:])
    assert stop.kind is StopKind.UNTIL, f"{stop}\n{said[-3000:].decode(errors='replace')}"
    return Ran(vm.instructions, bytes(said))


@pytest.mark.parametrize("name", LAST)
def test_says_its_last_word(name: str) -> None:
    fetched(name)
    with VM.linux(name, memory="512M") as vm:
        to_its_last_word(vm, LAST[name])


@pytest.mark.parametrize("name", ["u-boot", "u-boot-64"])
def test_says_the_same_on_both_engines(name: str) -> None:
    fetched(name)
    seen = set()
    for engine in ("dbt", "reference"):
        with VM.linux(name, memory="512M", engine=engine) as vm:
            seen.add(to_its_last_word(vm, LAST[name]))
    assert len(seen) == 1, seen


def test_xen_starts_by_multiboot_2_too() -> None:
    guest = fetched("xen")
    with VM("512M") as vm:
        vm.boot(
            lambda at: loader.load(
                at.memory, guest.kernel, modules=guest.modules, append=guest.append,
                rsdp=RSDP_GPA, method="multiboot2",
            )
        )  # fmt: skip
        assert b"Multiboot-e820 RAM map" in to_its_last_word(vm, LAST["xen"]).said


def test_a_network_boot_loader_is_refused_because_it_needs_a_bios() -> None:
    """Its file follows Linux's protocol, but has nothing to enter but 16-bit code."""
    try:
        archive = packages.tree("ipxe").read_bytes()
    except GuestError as error:
        pytest.skip(f"ipxe cannot be fetched here: {error}")
    kernel = file_in(archive, b"boot/ipxe.lkrn")
    with VM("64M") as vm, pytest.raises(GuestError, match=r"needs a PC's BIOS"):
        loader.load(vm.memory, kernel)


def file_in(archive: bytes, name: bytes) -> bytes:
    """A file in a cpio archive of the "newc" format."""
    at = 0
    while archive[at : at + 6] == b"070701":
        size, length = (int(archive[at + n : at + n + 8], 16) for n in (54, 94))
        data = at + 110 + length + 3 & -4
        if archive[at + 110 : at + 110 + length - 1] == name:
            return archive[data : data + size]
        at = data + size + 3 & -4
    raise AssertionError(f"no {name!r} in the package")
