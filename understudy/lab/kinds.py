"""The memory of a host's VMs by kinds, over time: recorded in a row, drawn as one figure.

    record(row, host.stock)  # again and again; then
    over_time(figure, [("title", row)], step_s=0.25)

Source: the kinds of `overcommit.accounts`.
Invariant: `row["off"]` counts the moments at which the kinds were not all of the VMs' memory.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from understudy.arch.address import PAGE
from understudy.lab.figure import KINDS
from understudy.lab.table import Row
from understudy.overcommit.accounts import Kind, accounts
from understudy.overcommit.stock import Stock

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def record(row: dict[str, Any], stock: Stock) -> Counter[Kind]:
    """One moment more: pages of each kind, of all VMs together."""
    told, now = accounts(stock), row.setdefault("moments", 0)
    found: Counter[Kind] = sum((Counter(vm.kinds) for vm in told.vms), Counter())
    row["off"] = row.get("off", 0) + (found.total() != sum(vm.size for vm in told.vms))
    row |= {f"{kind}{now}": found[kind] for kind in Kind}
    row["moments"] = now + 1
    return found


def over_time(figure: "Figure", panels: Sequence[tuple[str, Row]], step_s: float) -> None:
    """A panel for each (title, row): MBytes of each kind, one on top of the other."""
    grid = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for axes, (title, row) in zip(grid, panels, strict=False):
        seconds = [n * step_s for n in range(row["moments"])]
        sizes = [[row[f"{kind}{n}"] * PAGE / 1e6 for n in range(row["moments"])] for kind in Kind]
        axes.stackplot(seconds, sizes, labels=list(Kind), colors=KINDS, lw=0)
        axes.set_xlabel("seconds")
        axes.set_title(title, fontsize=9)
        axes.margins(0)
    grid[0].set_ylabel("MBytes of the guests")
    handles, names = grid[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, ncols=len(Kind), loc="outside upper center", fontsize=9)
