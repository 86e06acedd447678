"""What a technique costs is how many exits it takes, times what an exit costs.

Claim: the guest does the same work under every technique; the techniques differ in how often they
leave it and in what they do then. The table has wall time, exits and microseconds for each exit.

Source: lecture, "Optimizations for memory virtualization", "ISA extensions: memory virtualization
(continued), benefits of EPT", "Mode switches in Type-I and Type-II hypervisors".

Control: the machine counts its exits itself; its number and the hypervisor's are the same.

Note: a boot, a fork with wait, two switches of processes (see the experiments on these).
Microseconds are processor time outside the guest, divided by exits: the hypervisor's code, in
Python, and the way to it. Times depend on the computer; they decide nothing.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.linux_checks import name, same
from understudy.lab.linux_session import KERNELS, session
from understudy.lab.techniques import techniques

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("boot", "fork", "switch")


def select(values: Row) -> dict[str, Any]:
    """Time, exits and time for each exit of three parts of a session."""
    out: dict[str, Any] = {}
    for part in PARTS:
        found = values[part]
        out |= {
            f"{part}_s": found["wall_s"],
            f"{part}_exits": found["all_exits"] / found.get("rounds", 1),
            f"{part}_us_per_exit": found["us_per_exit"],
        }
        out[f"{part}_instructions"] = found["instructions"]
    parts = [values[part] for part in PARTS]
    return out | {
        "silicon": sum(part["silicon_exits"] for part in parts),
        "hypervisor": sum(part["all_exits"] + part["kicks"] for part in parts),
    }


def check(table: Table) -> list[Bar]:
    """The same work; every exit counted once on both sides."""
    return [
        *(same(f"{part}: the same instructions under every technique", table.rows,
               f"{part}_instructions") for part in PARTS),
        absent(every("the machine and the hypervisor count the same exits", table.rows,
                     lambda r: r["hypervisor"], lambda r: r["silicon"], name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Microseconds for each exit of a boot."""
    from understudy.lab.figure import bars

    kernels = table.values("kernel")

    def cost(kernel: str, paging: str) -> float | None:
        rows = table.where(kernel=kernel, paging=paging)
        return rows[0]["boot_us_per_exit"] if rows else None

    series = {
        paging: [cost(kernel, paging) for kernel in kernels] for paging in table.values("paging")
    }
    labels = [f"{kernel} · {KERNELS[kernel]}" for kernel in kernels]
    bars(figure.add_subplot(), labels, series, "µs for each exit of a boot, outside the guest")


EXPERIMENT = Experiment(
    measure=session,
    guest="unmodified Debian kernels with Debian's busybox",
    sweep={"kernel": list(KERNELS), "paging": techniques()},
    select=select,
    columns=["kernel", "paging", "boot_s", "boot_exits", "boot_us_per_exit", "fork_exits",
             "fork_us_per_exit", "switch_exits", "switch_us_per_exit"],
    slide=77,
    check=check,
    draw=draw,
)  # fmt: skip
