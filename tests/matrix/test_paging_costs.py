"""What each paging technique costs, operation by operation: the lecture's table, exactly.

Claims: lecture, "How to efficiently manage shadow page tables?", "The lazy shadow update approach",
"The Virtual TLB approach".  The guest is a page of code (see `tests.property.paging_machine`); its
own instructions and the page tables that map them cause the constant part of each count.
"""

from collections.abc import Callable

import pytest

from tests.property.paging_machine import DATA, FORMATS, ROOTS, TABLES, Machine
from tests.property.paging_oracle import PAE, RW, US, A, D, P
from tests.tree import ROOT

FULL = P | RW | US
LEAF = TABLES[7]
TECHNIQUES = ("eager", "lazy", "vtlb", "ept")
WRITES = 8  # page-table writes, and pages


class Bench(Machine):
    """Two address spaces that share one table of the last level, whose entries map 8 pages."""

    def __init__(self, paging: str, shape_name: str) -> None:
        shape = FORMATS[shape_name]
        super().__init__(paging, shape, [], room=0)
        middle = [TABLES[2], TABLES[3]][: len(shape.shifts) - 2]
        for root in ROOTS:
            for gfn, below in zip([root, *middle], [*middle, LEAF], strict=True):
                flags = P if shape is PAE and gfn == root else FULL
                self.edit(gfn, 0, below << 12 | flags, "store")
        for n in range(WRITES):
            self.edit(LEAF, n, DATA[n % 6] << 12 | FULL | A | D, "store")
        self.load_cr3(ROOTS[0])
        self.use()

    def use(self) -> None:
        """Write to each page."""
        for n in range(WRITES):
            self.must("store", rdi=(n << 12) + 0x100)

    def counted(self, work: Callable[[], None]) -> dict[str, int]:
        """Faults by kind and exits by name that `work` causes."""
        before = self._counts()
        work()
        after = self._counts()
        return {
            name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)
        }

    def _counts(self) -> dict[str, int]:
        counts = self.vm.counts()
        exits = {name: n for name, n in counts["exits"].items() if name != "CPUID"}
        exits.pop("EXCEPTION_OR_NMI", None)
        return counts["faults"] | exits | counts["cr_accesses"]


def documented() -> dict[str, list[list[str]]]:
    """The example of docs/paging/README.md: what exits in each of its rows, by technique."""
    text = (ROOT / "docs/paging/README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.partition("## One example")[2].partition("How to read it")[0].splitlines()
        if line.startswith("|")
    ]
    names, cells = rows[0][1:], rows[2:]
    return {
        name: [[] if row[n] == "–" else row[n].split(", ") for row in cells]
        for n, name in enumerate(names, 1)
    }


EXAMPLE = documented()


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_the_example_of_the_documentation(paging: str) -> None:
    """Each of its rows, exactly."""
    bench = Bench(paging, "Intel 64")
    edit_all(bench)
    bench.invlpg(0)
    for root in (ROOTS[1], ROOTS[0]):
        bench.load_cr3(root)
        bench.use()
    table = bench.tables_gva + (TABLES.index(LEAF) << 12)
    page = DATA[3] << 12 | FULL
    steps: list[Callable[[], None]] = [
        lambda: bench.must("store", rdi=table, eax=page | A | D),
        lambda: bench.must("store", rdi=table + 8, eax=page),
        lambda: bench.must("invlpg", rdi=0),
        lambda: bench.must("invlpg", rdi=0x1000),
        lambda: bench.must("load", rdi=0x100),
        lambda: bench.must("load", rdi=0x1100),
        lambda: bench.must("store", rdi=0x1100),
        lambda: bench.must("cr3", rdi=ROOTS[1] << 12),
        lambda: bench.must("store", rdi=0x1100),
        lambda: bench.must("store", rdi=0x2100),
    ]
    for step, expected in zip(steps, EXAMPLE[paging], strict=True):
        got = bench.counted(step)
        got.pop("CR_ACCESS", None)
        named = {name.removesuffix(" write"): n for name, n in got.items()}
        assert named == dict.fromkeys(expected, 1)
    bench.close()


@pytest.fixture(params=FORMATS)
def shape_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def edit_all(bench: Bench) -> None:
    """Write each entry of the table: the same again, but for the software's own bit 9."""
    size = bench.shape.entry_bytes
    window = bench.tables_gva + (TABLES.index(LEAF) << 12)
    for n in range(WRITES):
        value = DATA[n % 6] << 12 | FULL | A | D | 1 << 9
        bench.must("store", rdi=window + n * size, eax=value)
        bench.oracle.write((LEAF << 12) + n * size, value.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("paging", "traced"), [("eager", WRITES), ("lazy", 1), ("vtlb", 0), ("ept", 0)]
)
def test_page_table_writes(paging: str, traced: int, shape_name: str) -> None:
    """K writes to one table trap K times, once, or never."""
    bench = Bench(paging, shape_name)
    edit_all(bench)
    bench.invlpg(0)
    got = bench.counted(lambda: edit_all(bench))
    assert got.get("trace", 0) == traced
    assert set(got) <= {"trace", "hidden"}
    again = bench.counted(lambda: edit_all(bench))
    assert again.get("trace", 0) == (traced if paging == "eager" else 0)
    bench.close()


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_load_of_cr3(paging: str, shape_name: str) -> None:
    """A working set of W pages costs W hidden faults afterwards, or none."""
    bench = Bench(paging, shape_name)
    for root in (ROOTS[1], ROOTS[0]):
        bench.load_cr3(root)
        bench.use()

    def switch() -> None:
        bench.load_cr3(ROOTS[1])

    loaded = bench.counted(switch)
    assert loaded.get("CR3 write", 0) == (0 if paging == "ept" else 1)
    assert (
        bench.counted(lambda: bench.must("load", rdi=0)).get("hidden", 0) <= 2
    )  # code, and page 0
    got = bench.counted(bench.use)
    assert got.get("hidden", 0) == (WRITES - 1 if paging == "vtlb" else 0)
    assert bench.counted(bench.use) == {}
    bench.close()


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_invlpg(paging: str, shape_name: str) -> None:
    """One exit without EPT, none with it; the cache has lost one page."""
    bench = Bench(paging, shape_name)
    got = bench.counted(lambda: bench.invlpg(0x1000))
    assert got == ({} if paging == "ept" else {"INVLPG": 1})
    assert bench.counted(bench.use) == ({"hidden": 1} if paging == "vtlb" else {})
    bench.close()


@pytest.mark.parametrize(
    ("paging", "faults"),
    [
        ("eager", {"true": 1, "trace": 1}),
        ("lazy", {"true": 1, "trace": 1, "hidden": 1}),
        ("vtlb", {"true": 1, "hidden": 1}),
        ("ept", {}),
    ],
)
def test_a_page_on_demand(paging: str, faults: dict[str, int], shape_name: str) -> None:
    """The guest faults, maps a page, and goes on."""
    bench = Bench(paging, shape_name)
    edit_all(bench)  # now its window is in use, and (lazy) the table is protected again
    bench.invlpg(0)
    gva, size = WRITES << 12, bench.shape.entry_bytes

    def demand() -> None:
        assert bench.gadget("store", rdi=gva + 0x100).error == 2
        window = bench.tables_gva + (TABLES.index(LEAF) << 12) + WRITES * size
        bench.must("store", rdi=window, eax=DATA[0] << 12 | FULL | A | D)
        bench.must("store", rdi=gva + 0x100)

    got = {name: n for name, n in bench.counted(demand).items() if name in faults or n > 1}
    assert got == faults
    bench.close()


@pytest.mark.parametrize("paging", ["eager", "lazy", "vtlb"])
def test_the_processor_forgets_only_the_page_that_changed(paging: str, shape_name: str) -> None:
    """After a change of one entry and its INVLPG, the TLB still holds the other pages.

    One miss is the page that changed; under vtlb the walk faults first, and is made again.
    """
    bench = Bench(paging, shape_name)
    bench.use()
    place = bench.tables_gva + (TABLES.index(LEAF) << 12) + 3 * bench.shape.entry_bytes
    bench.must("store", rdi=place, eax=DATA[4] << 12 | FULL | A | D)
    bench.invlpg(3 << 12)
    processor = bench.guest.processor
    before = processor.counters()["tlb_misses"]
    bench.use()
    assert processor.counters()["tlb_misses"] - before == (2 if paging == "vtlb" else 1)
    bench.close()
