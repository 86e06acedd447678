"""Memory goes to who uses it: the idle-memory tax.

Claim: a host's memory is divided as the fixed point of rho = S / (P (f + k (1 - f))),
k = 1 / (1 - tau), says, to a page: by shares alone with tau 0, and the more by use the nearer tau
is to 1. That the pages with which it ends up are the same whether they are given at once or taken
one by one from who pays least is part of it.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server" (OSDI 2002), "Reclaiming Idle
Memory": two machines with equal shares on 360 MB, 256 MB each; tau 0.75 by default.

Control: without the tax (tau 0) the machine that uses its memory gets no more than the idle one.

Note: numbers of pages, a sixteenth of the paper's; no guest runs. The active pages of the idle
machine are 20 MB, as the paper's figure has them; those of the busy one are all that it can have.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.lab.fixed_point import fixed_point
from understudy.overcommit.plan import IdleTax, Need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MB = 16  # pages: a sixteenth of what the paper's machines have
ACTIVE = 20 * MB
FAR = 1  # page
HOSTS = {"paper": (360 * MB, 256 * MB), "no maximum": (360 * MB, 360 * MB)}
"""Pages of the host, and the maximum of each machine."""


def measure(host: str, tau: str, shares: int) -> dict[str, Any]:
    """The pages of the idle machine: given at once, taken one by one, and as the formula says."""
    pages, most = HOSTS[host]
    plan = IdleTax(float(tau))
    needs = Need("idle", 0, most, shares, ACTIVE), Need("busy", 0, most, 1, pages)
    got = plan.divide(needs, pages)
    has = {need.name: need.maximum for need in needs}
    while sum(has.values()) > pages:
        victim = plan.victim(needs, has)
        assert victim is not None
        has[victim.name] -= 1
    expected = fixed_point(*needs, pages, tau)
    return {
        "idle": got["idle"], "busy": got["busy"], "by_steps": has["idle"],
        "expected": round(expected), "too_far": int(abs(got["idle"] - expected) > FAR),
        "steps_too_far": int(abs(has["idle"] - expected) > FAR),
    }  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['host']}, tau {row['tau']}, {row['shares']} shares"


def check(table: Table) -> list[Bar]:
    """The formula, both ways, and the paper's numbers."""
    rows = table.where(shares=1)
    untaxed = [r for r in rows if r["tau"] == "0"]
    paper = [r for r in rows if r["tau"] == "0.75"]

    def favored(rows: Sequence[Row], words: str) -> Bar:
        holds = all(r["busy"] > r["idle"] for r in rows) if rows else None
        found = ", ".join(f"{r['busy'] // MB} and {r['idle'] // MB} MB" for r in rows)
        return true(f"with tau {words} who uses memory gets more", holds, found)

    return [
        every(
            "pages given at once are those of the formula, +-1", table.rows,
            lambda r: r["too_far"], lambda r: 0, name=name,
        ),
        every(
            "pages taken one by one end there, too, +-1", table.rows,
            lambda r: r["steps_too_far"], lambda r: 0, name=name,
        ),
        favored(paper, "0.75"),
        control("without the tax that is not so", favored(untaxed, "0")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """The idle machine's pages over the tax."""
    from understudy.lab.figure import lines, series

    rows = [{**row, "tax": float(row["tau"])} for row in table.where(shares=1)]
    lines(figure.add_subplot(), series(rows, "host", "tax", "idle"), "tau", "pages when idle")


EXPERIMENT = Experiment(
    measure=measure,
    guest="two machines with equal and unequal shares, one idle, one busy",
    sweep={
        "host": list(HOSTS), "tau": ["0", "0.25", "0.5", "0.75", "0.99"], "shares": [1, 2, 5],
    },
    quick={"shares": [1]},
    slide=37,
    check=check,
    draw=draw,
)  # fmt: skip
