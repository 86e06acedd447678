"""Frames that a guest gives up while it uses memory, under each paging technique.

Whatever kept a translation to such a frame has none afterwards, and a page table that was in one is
empty.  Source: none.
"""

import pytest

from tests.matrix.test_paging_costs import LEAF, TECHNIQUES, WRITES, Bench
from tests.property.paging_machine import DATA, FORMATS
from understudy.arch.address import PAGE
from understudy.machine.ballooned import Ballooned


@pytest.fixture(params=FORMATS)
def shape_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_page_is_gone_at_once_and_comes_back_empty(paging: str, shape_name: str) -> None:
    bench = Bench(paging, shape_name)
    memory, frames = bench.vm.memory, bench.vm.host.frames
    pages = Ballooned(memory)
    free, pfns = frames.free_count, [memory.p2m.lookup(gfn) for gfn in DATA[:6]]
    assert pages.inflate((gfn, 1) for gfn in DATA[:6]) == 6
    assert frames.free_count >= free + 6
    assert all(frames.references(pfn) == 0 for pfn in pfns if pfn is not None)
    bench.must("store", rdi=0x100)
    assert pages.broken == 1 and pages.ballooned == 5
    assert memory.read(DATA[0] << 12, PAGE).count(0) >= PAGE - 4
    pages.deflate((gfn, 1) for gfn in DATA[:6])
    for n in range(WRITES):
        bench.must("load", rdi=(n << 12) + 0x200)
    assert pages.ballooned == pages.free == 0 and pages.fetched == 6 and pages.broken == 1
    bench.use()
    bench.close()


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_page_table_that_was_in_one_maps_nothing(paging: str, shape_name: str) -> None:
    bench = Bench(paging, shape_name)
    memory = bench.vm.memory
    pages = Ballooned(memory)
    bench.must("load", rdi=0x100)
    assert pages.report([(LEAF, 1)]) == 1
    bench.invlpg(0)
    with pytest.raises(AssertionError):
        bench.must("load", rdi=0x100)
    assert memory.read(LEAF << 12, PAGE) == bytes(PAGE)
    bench.close()
