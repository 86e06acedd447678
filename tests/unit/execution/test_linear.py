"""What is kept of walks does not outlive the frames that they lead to."""

import pytest

from understudy.arch.address import PAGE_SHIFT
from understudy.execution.deprivileged import Deprivileged
from understudy.machine.words import ADDRESS
from understudy.paging.guest_walk import GuestFault
from understudy.vm import VM


@pytest.mark.parametrize("paging", ["eager", "lazy", "vtlb"])
def test_a_page_is_walked_to_again_when_its_frame_is_another(paging: str) -> None:
    with VM("1M", execution="deprivileged", paging=paging, virtualizable_isa=True) as vm:
        guest, p2m = vm.vcpus[0].guest, vm.memory.p2m
        assert isinstance(guest, Deprivileged)
        for gfn in (5, 6):
            vm.memory.write(gfn << PAGE_SHIFT, bytes([gfn]) * 8)
        assert guest.kernel_memory().load(5 << PAGE_SHIFT, 1) == 5
        p2m.map(5, (p2m.word(6) & ADDRESS) >> PAGE_SHIFT, 1)
        assert guest.kernel_memory().load(5 << PAGE_SHIFT, 1) == 6
        with p2m.batch():
            p2m.unmap(5, 1)
            with pytest.raises(GuestFault):
                guest.kernel_memory().load(5 << PAGE_SHIFT, 1)
