"""What is kept of walks does not outlive the frames that they lead to."""

import pytest

from tests.frame_owner import FrameOwner
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


@pytest.mark.parametrize("traced", [False, True])
def test_a_page_that_becomes_a_copy_is_read_where_it_is(traced: bool) -> None:
    """Between two looks at who asks: what is kept goes when a store moves the frame."""
    with VM("1M", execution="deprivileged", paging="lazy", virtualizable_isa=True) as vm:
        guest, p2m = vm.vcpus[0].guest, vm.memory.p2m
        assert isinstance(guest, Deprivileged)
        if not traced:
            p2m.tracers.clear()
        other = vm.host.frame() >> PAGE_SHIFT

        def copy(gfn: int) -> None:
            p2m.map(gfn, other, 1)

        FrameOwner(copy, lambda gfn: None).own(p2m)
        memory = guest.kernel_memory()
        assert memory.load(0x5008, 8) == 0
        p2m.protect(5)
        memory = guest.kernel_memory()
        assert memory.load(0x5008, 8) == 0
        memory.store(0x5008, 8, 7)
        assert memory.load(0x5008, 8) == 7
        assert vm.memory.read(0x5008, 1) == b"\7"


def test_the_first_of_two_pages_is_found_when_it_has_left_for_the_second() -> None:
    with VM("1M", execution="deprivileged", paging="lazy", virtualizable_isa=True) as vm:
        guest, p2m = vm.vcpus[0].guest, vm.memory.p2m
        assert isinstance(guest, Deprivileged)
        p2m.tracers.clear()
        others = {gfn: vm.host.frame() >> PAGE_SHIFT for gfn in (5, 6)}

        def bring(gfn: int) -> None:
            p2m.map(gfn, others[gfn], 1)
            if gfn == 6:
                p2m.take(5, 1)

        FrameOwner(p2m.unprotect, bring).own(p2m)
        p2m.take(6, 1)
        memory = guest.kernel_memory()
        assert memory.code(0x5FFC, 8) + memory.code(0x6000, 4) == bytes(8)
        memory.cover(0x5FFC, 8)
        memory.forget_code()
        p2m.take(6, 1)
        guest.kernel_memory().store(0x5FFC, 8, 0x1234_5678_9ABC_DEF0)
        assert vm.memory.read(0x5FFC, 8) == (0x1234_5678_9ABC_DEF0).to_bytes(8, "little")
