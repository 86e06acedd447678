"""A frame that was a page table and is none any more is written freely after a few traps.

What: a guest frees a table without a word, and goes on to use its memory for data; counted are the
trace faults.  Source: `understudy.paging.untrace`.  Control: a table that is in use goes on being
traced, write for write.
"""

from collections.abc import Callable

import pytest

from tests.matrix.test_paging_costs import FULL, LEAF, Bench
from tests.property.paging_machine import DATA, FORMATS, ROOTS, TABLES
from understudy.paging.untrace import FEW, MOST

SPARE = TABLES[6]  # a table of the last level for the second address space alone
WORDS = 100


@pytest.fixture(params=FORMATS)
def shape_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def address_of(bench: Bench, gfn: int, offset: int = 0) -> int:
    """Where the guest writes to one of its tables."""
    return bench.tables_gva + (TABLES.index(gfn) << 12) + offset


def first_address(bench: Bench) -> int:
    """What SPARE's first entry maps, in the second address space."""
    shifts = bench.shape.shifts
    return sum(1 << shift for shift in shifts[:-1])


def use_and_leave(paging: str, shape_name: str) -> Bench:
    """The second address space gets a table of its own, is used, and is left for good."""
    bench = Bench(paging, shape_name)
    size = bench.shape.entry_bytes
    own = [TABLES[4], TABLES[5]][: len(bench.shape.shifts) - 2]
    for gfn, below in zip([ROOTS[1], *own], [*own, SPARE], strict=True):
        flags = 1 if shape_name == "PAE" and gfn == ROOTS[1] else FULL
        bench.must("store", rdi=address_of(bench, gfn, size), eax=below << 12 | flags)
    for n in range(4):
        page = DATA[n] << 12 | FULL
        bench.must("store", rdi=address_of(bench, SPARE, n * size), eax=page)
    bench.load_cr3(ROOTS[1])
    begin = first_address(bench)
    for n in range(4):
        bench.must("load", rdi=begin + (n << 12))
    for n in range(8):  # until the window's entries are there and nothing but traces is left
        bench.must("store", rdi=address_of(bench, SPARE, 4000 + n * size), eax=0)
    bench.load_cr3(ROOTS[0])
    bench.must("load", rdi=address_of(bench, SPARE))
    return bench


def write_words(bench: Bench, offset: int = 0, stride: int = 8) -> Callable[[], None]:
    """Data go where the table was."""

    def write() -> None:
        for n in range(WORDS):
            at = address_of(bench, SPARE, offset + n * stride)
            bench.must("store", rdi=at, eax=0xDA7A_0000 | n << 1)

    return write


def test_a_dead_table_under_eager(shape_name: str) -> None:
    """Writes that could be entries: no more than a few trap."""
    bench = use_and_leave("eager", shape_name)
    assert SPARE in bench.vm.pages.traced
    got = bench.counted(write_words(bench))
    assert 0 < got.get("trace", 0) <= FEW
    assert SPARE not in bench.vm.pages.traced
    assert bench.counted(write_words(bench)) == {}
    bench.close()


@pytest.mark.parametrize("paging", ["eager", "lazy"])
def test_writes_that_are_no_entries(paging: str, shape_name: str) -> None:
    """The first one is enough, also where the loaded address space still leads."""
    bench = use_and_leave(paging, shape_name)
    bench.load_cr3(ROOTS[1])
    got = bench.counted(write_words(bench, offset=2))
    assert got.get("trace", 0) == 1
    assert SPARE not in bench.vm.pages.traced
    bench.close()


def test_a_dead_table_under_lazy(shape_name: str) -> None:
    """One trap for each group of writes: no more than a few of them."""
    bench = use_and_leave("lazy", shape_name)

    def groups() -> None:
        for n in range(4 * FEW):
            bench.must("store", rdi=address_of(bench, SPARE, 8 * n), eax=0xDA7A_0000)
            bench.invlpg(0)

    got = bench.counted(groups)
    assert 0 < got.get("trace", 0) <= FEW
    assert SPARE not in bench.vm.pages.traced
    assert bench.counted(groups).get("trace", 0) == 0
    bench.close()


def test_a_table_that_is_left_in_place(shape_name: str) -> None:
    """The loaded address space still leads to it, but nothing there is used any more."""
    bench = use_and_leave("eager", shape_name)
    bench.load_cr3(ROOTS[1])

    def write() -> None:
        for n in range(MOST + WORDS):
            bench.must("store", rdi=address_of(bench, SPARE, n % 512 * 8), eax=0xDA7A_0000)

    got = bench.counted(write)
    assert WORDS < got.get("trace", 0) <= MOST + 1
    assert bench.counted(write_words(bench)) == {}
    bench.close()


def test_a_table_in_use_is_traced(shape_name: str) -> None:
    """The control: each round of writes is followed by a use, and traps write for write."""
    bench = Bench("eager", shape_name)
    size = bench.shape.entry_bytes
    for _ in range(FEW):

        def write() -> None:
            for n in range(WORDS):
                at = address_of(bench, LEAF, 1000 * size // 8 + n % 8 * size)
                bench.must("store", rdi=at, eax=0)

        assert bench.counted(write).get("trace", 0) == WORDS
        bench.use()
        assert LEAF in bench.vm.pages.traced
    bench.close()


def test_a_forgotten_address_space_comes_back(shape_name: str) -> None:
    """A sign that was wrong costs hidden faults and nothing else."""
    bench = use_and_leave("eager", shape_name)
    write_words(bench, offset=1024)()
    begin = first_address(bench)
    bench.load_cr3(ROOTS[1])
    for n in range(4):
        done = bench.gadget("load", rdi=begin + (n << 12) + 8)
        assert (done.error, done.eax) == (None, 0x5AFE_0000 | DATA[n] << 1)
    assert SPARE in bench.vm.pages.traced
    bench.close()
