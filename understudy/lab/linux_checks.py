"""What must hold of every loop in a Linux, and how its figure looks.

Source: lecture, "ISA extensions: memory virtualization (continued), benefits of EPT"; the
identities are the architecture's: what the guest executes, and which faults are its own, cannot
depend on how its memory is virtualised.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from understudy.lab.bars import Bar, every
from understudy.lab.linux_session import KERNELS
from understudy.lab.table import Row, Table
from understudy.lab.techniques import SHADOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 1.0  # exits a round: one stray timer tick faults in dozens of pages under vtlb


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['kernel']} {row['paging']}"


def same(statement: str, rows: Iterable[Row], column: str) -> Bar:
    """A column has one value for each kernel, whatever the technique."""
    rows = list(rows)
    first: dict[Any, Any] = {}
    for row in rows:
        first.setdefault(row["kernel"], row[column])
    alone = len({row["paging"] for row in rows}) < 2
    return every(
        statement, [] if alone else rows, lambda r: r[column], lambda r: first[r["kernel"]],
        name=name,
    )  # fmt: skip


def holds(statement: str, rows: Iterable[Row], question: Callable[[Row], bool], column: str) -> Bar:
    """Something is true of every row; rows of which it is not show `column`."""
    return every(
        statement, rows, lambda r: True if question(r) else f"{r[column]:.2f}", lambda r: True,
        name=name,
    )  # fmt: skip


def compare(
    statement: str, table: Table, column: str, low: str, high: str, factor: float = 1.0
) -> Bar:
    """For each kernel, technique `low` has less of a column than `high`, by this factor."""
    pairs = []
    for kernel in table.values("kernel"):
        a, b = (table.where(kernel=kernel, paging=paging) for paging in (low, high))
        if a and b:
            pairs.append({"kernel": kernel, "low": a[0][column], "high": b[0][column]})
    return every(
        statement,
        pairs,
        lambda r: True if r["low"] * factor < r["high"] else f"{r['low']:.2f}, {r['high']:.2f}",
        lambda r: True,
        name=lambda r: str(r["kernel"]),
    )


def identities(table: Table) -> list[Bar]:
    """Of every loop, under every technique."""
    return [
        same("the guest executes the same instructions under every technique, to the last one",
             table.rows, "instructions"),
        same("the guest's own page faults are the same in number under every shadow technique",
             table.where(paging=SHADOW), "true_faults"),
        every("ept: no exit for a page fault, for CR3 or for INVLPG", table.where(paging="ept"),
              lambda r: r["mmu_exits"], lambda r: 0, name=name),
    ]  # fmt: skip


def draw_kinds(table: Table, figure: "Figure", label: str) -> None:
    """Exits of one round: for each kernel and technique a bar, made of its kinds."""
    from understudy.lab.figure import stacks

    rows = table.rows
    kinds = {
        "true faults": "true_faults",
        "hidden faults": "hidden_faults",
        "trace faults": "trace_faults",
        "CR3": "cr3_exits",
        "INVLPG": "invlpg_exits",
    }
    panels = [f"{row['kernel']} · {KERNELS[row['kernel']]}" for row in rows]
    parts = [{kind: max(row[column], 0.0) for kind, column in kinds.items()} for row in rows]
    names = [row["paging"] for row in rows]
    stacks(figure, panels, list(zip(panels, names, parts, strict=True)), label)
