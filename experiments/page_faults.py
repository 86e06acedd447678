"""A page of new memory costs two exits or three without EPT, and none with it.

Claim: the first touch of a page is a true fault, which the hypervisor gets and passes on; the
guest then writes one page-table entry. Under a virtual TLB the page's shadow entry comes by a
hidden fault (two exits); where updates are traced, the write is an exit of its own and may bring
the entry (two, or three with the fault that brings it); lazily updated shadows take the hidden
fault and one trace fault for a whole table. Under extended page tables the guest handles its
faults alone.

Source: lecture, "A reminder on shadow page tables", "The “lazy shadow update” approach (2/3):
adding new mappings", "The “Virtual TLB” approach (6/7): refill", "ISA extensions: memory
virtualization (continued), benefits of EPT".

Control: a shell loop that touches no new page costs no such exit.

Note: `dd` reads zeros into a buffer that grows by 1024 pages; huge pages are off. Numbers are for
one page.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent
from understudy.lab.linux_checks import NOISE, draw_kinds, holds, identities
from understudy.lab.linux_session import KERNELS, LOOP_COLUMNS, loop_row, session
from understudy.lab.techniques import SHADOW, techniques

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def select(values: Row) -> dict[str, Any]:
    """The faulting loop's part of a session."""
    return loop_row(dict(values), "fault")


def check(table: Table) -> list[Bar]:
    """Identities exactly; rates for each page to one in a hundred."""

    def near(row: Row, column: str, value: float) -> bool:
        return bool(abs(row[column] - value) <= 0.01)

    return [
        *identities(table),
        holds("one true fault for each page", table.where(paging=SHADOW),
              lambda r: near(r, "true_faults", 1), "true_faults"),
        holds("eager: each page's entry is traced", table.where(paging="eager"),
              lambda r: r["trace_faults"] >= 0.99, "trace_faults"),
        holds("lazy: one trace fault for many pages", table.where(paging="lazy"),
              lambda r: r["trace_faults"] <= 0.05, "trace_faults"),
        holds("vtlb: no trace fault", table.where(paging="vtlb"),
              lambda r: r["trace_faults"] == 0, "trace_faults"),
        holds("vtlb: at least one hidden fault for each page", table.where(paging="vtlb"),
              lambda r: r["hidden_faults"] >= 0.99, "hidden_faults"),
        holds("lazy: so too, but for what a synchronization point has brought",
              table.where(paging="lazy"),
              lambda r: r["hidden_faults"] >= 0.95, "hidden_faults"),
        absent(holds("a loop that touches nothing new takes no such exit",
              table.where(paging=("ept", "vtlb", "lazy")),
              lambda r: abs(r["idle_mmu_exits"]) <= NOISE, "idle_mmu_exits")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits of one page by kind."""
    draw_kinds(table, figure, "exits for one new page")


EXPERIMENT = Experiment(
    measure=session,
    guest="unmodified Debian: `dd` of busybox with a large buffer",
    sweep={"kernel": list(KERNELS), "paging": techniques()},
    select=select,
    columns=LOOP_COLUMNS,
    slide=32,
    check=check,
    draw=draw,
)
