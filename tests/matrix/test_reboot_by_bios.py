"""A guest that reboots "by BIOS" starts again: it jumps to F000:FFF0 in real-address mode.

What: Linux with `reboot=b`, whose kernel panics for want of a root file system and reboots at once.
Source: Linux, Documentation/admin-guide/kernel-parameters.txt, "reboot=" and "panic=".
Invariant: each time it starts from the beginning, and is the same boot.
"""

import itertools

import pytest

from tests.guests.fetched import fetched
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import loader
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

APPEND = "console=ttyS0 reboot=b panic=-1 root=/dev/none"
WALL_S = 300.0


def reboots(guest: str, paging: str, times: int) -> tuple[Stop, list[int], bytes]:
    """How it ended; after how many instructions each time; what it printed."""
    kernel = fetched(guest).kernel
    resets, heard = [0], bytearray()
    with VM("128M", paging=paging) as vm:
        vm.console.on_output.append(heard.extend)
        vm.on_reset.append(lambda: resets.append(vm.instructions))
        vm.boot(
            lambda machine: loader.load(
                machine.memory, kernel, append=APPEND, rsdp=RSDP_GPA, seed=bytes(32)
            )
        )
        stop = vm.go(until=lambda: len(resets) > times, wall_seconds=WALL_S)
    lengths = [end - start for start, end in itertools.pairwise(resets)]
    return stop, lengths, bytes(heard)


def check(guest: str, times: int, paging: str = "ept") -> None:
    stop, lengths, heard = reboots(guest, paging, times)
    assert stop.kind == StopKind.UNTIL, stop
    assert len(lengths) == heard.count(b"Linux version") == times
    assert max(lengths) - min(lengths) < min(lengths) // 10  # the clocks go on: not the very same


@pytest.mark.real_guest
def test_it_starts_again() -> None:
    check("cloud-amd64", 2)


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.parametrize("guest", ["cloud-amd64", "686", "686-pae", "cloud-amd64-6.12"])
def test_it_starts_again_five_times(guest: str) -> None:
    check(guest, 5)


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.parametrize("paging", ["eager", "lazy", "vtlb"])
def test_without_the_guests_ept_too(paging: str) -> None:
    check("cloud-amd64", 2, paging)
