"""What `inspect` shows of a real guest is what the processor's own walker finds.

Source: none.  Invariant: both see the same entries at the same host-physical addresses.
"""

import pytest

from tests.matrix.lockstep import linux
from understudy.inspection import Inspection
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

INSTRUCTIONS = 40_000_000  # paging is on, and the kernel maps its memory
FORMATS = {"686": "32-bit paging", "686-pae": "PAE paging", "cloud-amd64": "4-level paging"}


def references(vm: VM, found: Inspection) -> tuple[list[tuple[int, int]], list[int]]:
    """(hpa, entry) of the guest's entries, but for PAE's registers; the EPT's last entries."""
    guest = [(vm.memory.hpa(s.at), s.entry) for s in found.guest.steps if s.at is not None]
    return [(hpa, e) for hpa, e in guest if hpa is not None], [s.entry for s in found.ours.steps]


@pytest.mark.parametrize("guest", FORMATS)
def test_the_processors_walker_agrees(guest: str) -> None:
    vm = linux("dbt", guest)
    try:
        vm.go(budget=INSTRUCTIONS)
        vm.vcpus[0].leave_guest()
        before = vm.processors[0].state_hash()
        registers = vm.vcpus[0].guest.registers()
        rip = registers["rip"]
        places = {
            rip + sign * (step << 12) for step in (0, 1, 77, 3000, 50_000) for sign in (1, -1)
        }
        places |= {registers["rsp"], registers["idtr_base"], 0x1000, 0x0804_8000}
        mapped = 0
        for gva in sorted(place & 0xFFFF_FFFF_FFFF_FFFF for place in places):
            if guest != "cloud-amd64":
                gva &= 0xFFFF_FFFF
            found = vm.inspect(gva)
            assert found.guest.title.endswith(FORMATS[guest])
            walked = vm.processors[0].walk(
                gva, registers["cr3"], registers["cr4"], registers["efer"], vm.pages.eptp
            )
            ours, theirs = references(vm, found)
            assert ours == [(hpa, entry) for kind, _, hpa, entry in walked if kind == "guest"]
            if found.guest.address is not None:
                mapped += 1
                assert theirs == [e for kind, _, _, e in walked if kind == "host"][-len(theirs) :]
                assert found.ours.address == vm.memory.hpa(found.guest.address)
        assert mapped >= 5
        assert vm.processors[0].state_hash() == before
    finally:
        vm.close()


@pytest.mark.parametrize("guest", FORMATS)
def test_a_shadow_leads_where_the_guests_tables_and_the_p2m_lead(guest: str) -> None:
    vm = linux("dbt", guest, paging="vtlb")
    try:
        vm.go(budget=INSTRUCTIONS)
        vm.vcpus[0].leave_guest()
        registers = vm.vcpus[0].guest.registers()
        filled = 0
        for name in ("rip", "rsp", "idtr_base", "gdtr_base"):
            found = vm.inspect(registers[name])
            assert found.ours.title.startswith("the shadow's walk: ")
            assert found.guest.address is not None
            if found.ours.address is None:
                assert "hidden fault" in found.ours.end
            else:
                filled += 1
                assert found.ours.address == vm.memory.hpa(found.guest.address)
        assert filled >= 2
        assert "hidden fault" in vm.inspect(0x1234_5000).ours.end
    finally:
        vm.close()
