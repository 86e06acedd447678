"""A kernel that knows its hypervisor turns interrupts off and on without an exit.

Claim: with the interrupt-enable bit in memory that both see, CLI and STI cost no exit, without it
one each. State of programs that is changed K times is synchronized once, when the kernel goes back
to one, else K times. P changes of page tables take ⌈P/2048⌉ calls, one by one P.

Source: lecture, "Para-virtualization", examples 1 and 2; P. Barham et al., "Xen and the Art of
Virtualization", SOSP 2003, section 3.3.3 (batches; 2048 changes map 8 MBytes).

Control: with a feature off its own cost is back, and that of the others stays away.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, control, every, true
from understudy.lab.teaching import booted, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 2048
OPERATIONS = {"irq": 2, "state": 4, "map": 2}
"""What the guest does, and of how many parts each time: off and on, four kinds, map and unmap."""
SWITCHES = {"all on": "", "no virtual IF": "no-if", "no lazy state": "no-lazy",
            "no batches": "no-batch"}  # fmt: skip
OWN = {"irq": "no virtual IF", "state": "no lazy state", "map": "no batches"}


def measure(bits: int, features: str, operation: str, times: int) -> dict[str, Any]:
    """Count while the guest does it so many times, less what is counted around it."""
    with booted("pv", "pv", bits, SWITCHES[features]) as vm:
        counted(vm, operation, times)  # what page tables it needs are there
        around, found = counted(vm, operation, 0), counted(vm, operation, times)
    return {
        "parts": OPERATIONS[operation] * times,
        "exits": sum(found["exits"].values()) - sum(around["exits"].values()),
        "synchronized": found["execution"]["synchronized"],
        "changes": found["execution"]["updates"],
    }


def foretold(row: Row) -> int:
    """Exits."""
    operation, times = row["operation"], row["times"]
    if row["features"] == OWN[operation]:
        return int(row["parts"])
    return 2 * -(-times // BATCH) if operation == "map" else 0


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['operation']} × {row['times']}, {row['features']}, {row['bits']} bits"


def check(table: Table) -> list[Bar]:
    """Exact."""
    words = {
        "irq": "CLI and STI cost no exit with the virtual IF, one each without",
        "state": "K changes of state cost no exit if they are lazy, else K",
        "map": "P changes of page tables cost ⌈P/2048⌉ calls, or P without batches",
    }
    return [
        *(every(words[one], table.where(operation=one), lambda r: r["exits"], foretold, name=name)
          for one in OPERATIONS),
        every("lazy state is synchronized once, when the kernel goes back to a program",
              table.where(operation="state"), lambda r: r["synchronized"],
              lambda r: int(r["features"] != OWN["state"]), name=name),
        every("each change of a page table is made", table.where(operation="map"),
              lambda r: r["changes"], lambda r: r["parts"], name=name),
        absent(every("another feature's switch changes nothing",
                     [row for row in table.where(operation="irq")
                      if row["features"] in ("no lazy state", "no batches")],
                     lambda r: r["exits"], lambda r: 0, name=name)),
        control("a feature that is off costs nothing", true("no exits", not any(
            row["exits"] for row in table.rows if row["features"] == OWN[row["operation"]]
        ), "there are")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits over the number of changes of page tables, with and without batches."""
    from understudy.lab.figure import lines, series

    rows = [row for row in table.where(operation="map", bits=64)
            if row["features"] in ("all on", "no batches")]  # fmt: skip
    points = series(rows, "features", "parts", "exits")
    lines(figure.add_subplot(), points, "changes of page tables", "exits", log=True)


EXPERIMENT = Experiment(
    measure=measure,
    guest="the paravirtual teaching kernel, whose kernel does one thing many times",
    sweep={
        "bits": [64, 32], "features": list(SWITCHES), "operation": list(OPERATIONS),
        "times": [1, 100, 2048, 2049, 4096],
    },
    quick={"times": [100, 2049]},
    columns=["operation", "times", "features", "bits", "parts", "exits", "synchronized"],
    slide=51,
    check=check,
    draw=draw,
)  # fmt: skip
