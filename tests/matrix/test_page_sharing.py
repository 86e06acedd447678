"""Booted Debians whose memory is shared by its contents, and swapped out, while they go on.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory".  Counts
are asserted: every frame has as many owners as guests name it, and every answer is right.
"""

from collections import Counter
from itertools import chain

import pytest

from tests.matrix.lockstep import linux
from understudy.linux import VM
from understudy.overcommit.sharing import Sharing, use
from understudy.overcommit.swap import Swap
from understudy.paging import Paging

ALL = 1 << 30
CHECK = "sha256sum /bin/busybox /proc/cpuinfo | sha256sum"


def audit(vms: list[VM]) -> None:
    """Each frame has exactly the owners that name it, and the sums are what there is."""
    host = vms[0].host
    named = Counter(
        pfn for _, first, frames in chain.from_iterable(vm.memory.p2m for vm in vms)
        for pfn in range(first, first + frames)
    )  # fmt: skip
    assert all(host.frames.references(pfn) == owners for pfn, owners in named.items())
    told = use(host, [vm.memory.p2m for vm in vms])
    assert told.consumed == len(named)
    assert told.own + told.shared == told.consumed + told.saved == named.total()
    assert told.own + told.shared + told.absent == len(vms) * sum(
        count for _, count in vms[0].memory.layout()
    )


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.parametrize("paging", Paging.ALL)
def test_two_debians_share_and_swap_and_go_on(paging: str) -> None:
    with linux(paging=paging) as first:
        right = first.run(CHECK).check().output
        with (
            VM.restore(first.save(), host=first.host) as second,  # its frames are its own
            Swap(first.host, 1 << 28) as swap,
        ):
            vms, sharing = [first, second], Sharing(first.host)
            for vm in vms:
                sharing.join(vm.memory.p2m)
            before = first.host.frames.free_count
            merged = sharing.scan(ALL)
            assert first.host.frames.free_count == before + merged
            told = use(first.host, [vm.memory.p2m for vm in vms])
            assert told.saved == merged
            print(f"{paging}: {told}, hints {sharing.hints}")
            assert told.shared > 0.9 * (told.own + told.shared)  # the same moment, twice
            audit(vms)
            for vm in vms:
                assert vm.run(CHECK).check().output == right
            audit(vms)
            for vm in vms:
                swap.join(vm.memory.p2m)
                assert swap.reclaim(vm.memory.p2m, 4096)  # of what it does not share any more
            audit(vms)
            for vm in vms:
                assert vm.run(CHECK).check().output == right
            assert swap.read
            audit(vms)
            for vm in vms:
                swap.leave(vm.memory.p2m)
