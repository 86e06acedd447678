"""Two processes that take turns show what a load of CR3 costs.

Claim: each switch between two processes loads CR3. A virtual TLB then faults in both working sets
anew, page by page; kept shadows need no fault at all; under extended page tables there is not
even an exit for CR3.

Source: lecture, "The “Virtual TLB” approach (7/7): synchronization points", "How to efficiently
manage shadow page tables?", "ISA extensions: memory virtualization (continued), benefits of EPT".

Control: a shell loop in one process costs no such exit.

Note: two shells send a line to and fro through two pipes; a round is two switches. Numbers are
for one round.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent
from understudy.lab.linux_checks import NOISE, compare, draw_kinds, holds, identities, same
from understudy.lab.linux_session import KERNELS, LOOP_COLUMNS, loop_row, session
from understudy.lab.techniques import SHADOW, techniques

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def select(values: Row) -> dict[str, Any]:
    """The switching loop's part of a session."""
    return loop_row(dict(values), "switch")


def check(table: Table) -> list[Bar]:
    """Identities exactly; the order of the techniques."""
    return [
        *identities(table),
        same("CR3 is loaded equally often under every shadow technique",
             table.where(paging=SHADOW), "cr3_exits"),
        holds("two loads of CR3 in a round", table.where(paging=SHADOW),
              lambda r: abs(r["cr3_exits"] - 2) <= 0.05, "cr3_exits"),
        holds("vtlb: a hundred hidden faults and more in a round", table.where(paging="vtlb"),
              lambda r: r["hidden_faults"] >= 100, "hidden_faults"),
        holds("eager and lazy: no hidden fault", table.where(paging=("eager", "lazy")),
              lambda r: abs(r["hidden_faults"]) <= NOISE, "hidden_faults"),
        compare("vtlb takes over ten times lazy's exits", table, "mmu_exits", "lazy", "vtlb", 10),
        absent(holds("one process alone takes no such exit",
              table.where(paging=("ept", "vtlb", "lazy")),
              lambda r: abs(r["idle_mmu_exits"]) <= NOISE, "idle_mmu_exits")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits of one round by kind."""
    draw_kinds(table, figure, "exits for one round")


EXPERIMENT = Experiment(
    measure=session,
    guest="unmodified Debian: two of busybox's shells and two pipes",
    sweep={"kernel": list(KERNELS), "paging": techniques()},
    select=select,
    columns=LOOP_COLUMNS,
    slide=33,
    check=check,
    draw=draw,
)
