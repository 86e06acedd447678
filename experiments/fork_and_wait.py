"""A fork costs most where every page-table update is traced.

Claim: fork copies page tables and makes pages read-only, one entry at a time; each of these
writes is an exit where updates are traced at once, few are where a first write unprotects the
table, none under a virtual TLB, which pays by faulting in what its loads of CR3 threw away; under
extended page tables there is no exit at all.

Source: lecture, "The “lazy shadow update” approach", "The “Virtual TLB” approach"; K. Adams and
O. Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS 2006
(forkwait).

Control: the same shell loop without the fork costs no such exit.

Note: the loop is `(:)` in Debian's busybox: fork, exit, wait. Numbers are for one round.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent
from understudy.lab.linux_checks import NOISE, compare, draw_kinds, holds, identities, same
from understudy.lab.linux_session import KERNELS, LOOP_COLUMNS, loop_row, session
from understudy.lab.techniques import SHADOW, techniques

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def select(values: Row) -> dict[str, Any]:
    """The fork loop's part of a session."""
    return loop_row(dict(values), "fork")


def check(table: Table) -> list[Bar]:
    """Identities exactly; the order of the techniques."""
    return [
        *identities(table),
        same("CR3 is loaded equally often under every shadow technique",
             table.where(paging=SHADOW), "cr3_exits"),
        compare("eager takes over ten times lazy's trace faults", table, "trace_faults", "lazy",
                "eager", 10),
        holds("vtlb: no trace fault", table.where(paging="vtlb"),
              lambda r: r["trace_faults"] == 0, "trace_faults"),
        compare("vtlb takes over twice lazy's hidden faults", table, "hidden_faults", "lazy",
                "vtlb", 2),
        compare("in all, lazy takes fewer exits than vtlb", table, "mmu_exits", "lazy", "vtlb"),
        compare("in all, vtlb takes fewer exits than eager", table, "mmu_exits", "vtlb", "eager"),
        absent(holds("without the fork there is no such exit",
              table.where(paging=("ept", "vtlb", "lazy")),
              lambda r: abs(r["idle_mmu_exits"]) <= NOISE, "idle_mmu_exits")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits of one round by kind."""
    draw_kinds(table, figure, "exits for one fork and wait")


EXPERIMENT = Experiment(
    measure=session,
    guest="unmodified Debian: `(:)` in a loop of busybox's shell",
    sweep={"kernel": list(KERNELS), "paging": techniques()},
    select=select,
    columns=LOOP_COLUMNS,
    slide=26,
    check=check,
    draw=draw,
)
