"""Five Debians on a host of little more than half their memory: what they have alike stays there.

Claim: five Linux guests boot on a host that is overcommitted by 60 %. Of what is scanned as fast as
they boot nothing has to be swapped out. If the scan is ten times slower, pages are; and if each is
looked up before, so that it is shared if another one is like it, fewer go to the swap file, fewer
are in it afterwards and fewer are read from it than with that scan alone. A look-up without a scan
helps hardly at all. All boot in any case.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory": five machines on a host overcommitted by 60 % had less than 20 MBytes swapped out after
their boot.

Control: with neither scan nor look-up more than the paper's 20 MBytes are in the swap file.

Note: Debian's cloud kernel with a small user land, 96 MBytes each; pages a second of virtual time
are scanned, for a boot takes six. To look up what nobody has scanned finds hardly anything: what is
not shared is gone. The figure is all memory of the guests by kinds, over time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from understudy.arch.address import PAGE
from understudy.clock import NS_PER_SECOND
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.lab.kinds import over_time, record
from understudy.overcommit.terms import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUESTS, MEMORY, RAM = 5, "96M", "300M"  # 480 MBytes, 1.6 times as many
NONE, SLOW, FAST = 0, 5_000, 50_000  # pages a second
LONGEST_NS = 600 * NS_PER_SECOND
MOMENTS: Final = 4  # a second, of the figure
PUBLISHED: Final = 20 * 10**6 // PAGE  # pages
HARDLY: Final = 100  # one in so many


def measure(kernel: str, scan: int, looks_up: str) -> dict[str, Any]:
    """Boot them all at once."""
    terms = Terms(scan=scan, looks_up=looks_up == "yes", balloons=False)
    row: dict[str, Any] = {}
    with Host(pcpus=2, ram=RAM, overcommit=terms) as host:
        vms = [host.linux(kernel, memory=MEMORY, name=f"vm{n}") for n in range(GUESTS)]

        def booted() -> int:
            return sum(vm.session.channel.is_there for vm in vms)

        while booted() < GUESTS and (now := host.schedule.time.now()) < LONGEST_NS:
            record(row, host.stock)
            host.run(
                until=lambda: booted() == GUESTS, deadline_ns=now + NS_PER_SECOND // MOMENTS
            )  # fmt: skip
        record(row, host.stock)
        swap, sharing = host.stock.swap, host.stock.sharing
        assert swap is not None
        return row | {
            "booted": booted(), "written": swap.written, "in_file": swap.in_file,
            "read": swap.read, "looked_up": swap.looked_up, "alike": swap.alike,
            "merged": sharing.merged if sharing is not None else 0,
            "ms": host.schedule.time.now() // 1_000_000,
        }  # fmt: skip


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['kernel']}, {row['scan']} pages a second, looked up: {row['looks_up']}"


def check(table: Table) -> list[Bar]:
    """What went to the file."""
    alone, both = table.where(scan=SLOW, looks_up="no"), table.where(scan=SLOW, looks_up="yes")
    neither, blind = (list(table.where(scan=NONE, looks_up=looks)) for looks in ("no", "yes"))

    def less(words: str, some: Sequence[Row], others: Sequence[Row], *columns: str) -> Bar:
        pairs = [(a[what], b[what]) for a, b in zip(some, others, strict=False) for what in columns]
        found = ", ".join(f"{a} and {b}" for a, b in pairs)
        return true(words, all(a < b for a, b in pairs) if pairs else None, found)

    def few(words: str, rows: Sequence[Row]) -> Bar:
        return every(words, rows, lambda r: r["in_file"] < PUBLISHED, lambda r: True, name=name)

    return [
        every("all boot", table, lambda r: r["booted"], lambda r: GUESTS, name=name),
        every("at each moment all pages are of some kind", table,
              lambda r: r["off"], lambda r: 0, name=name),
        less("with the slow scan, fewer go to the file, are there and are read than without",
             list(alone), neither, "written", "in_file", "read"),
        less("and fewer still with the look-up", list(both), list(alone),
             "written", "in_file", "read"),
        every("what was looked up was alike, or went to the file", table,
              lambda r: r["looked_up"] - r["alike"] if r["looks_up"] == "yes" else r["looked_up"],
              lambda r: r["written"] if r["looks_up"] == "yes" else 0, name=name),
        every("without a scan, hardly one page in a hundred is alike", blind,
              lambda r: r["alike"] * HARDLY < r["looked_up"], lambda r: True, name=name),
        few("with the fast scan less than the paper's 20 MBytes is in the file",
            list(table.where(scan=FAST))),
        control("with neither that is not so", few("", neither)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Kinds over time, point by point."""
    looks = {"yes": "look-up", "no": "no look-up"}
    panels = [(f"{row['scan']} pages/s,\n{looks[row['looks_up']]}", row) for row in table]
    over_time(figure, panels, 1 / MOMENTS)


EXPERIMENT = Experiment(
    measure=measure,
    guest="five Debians of 96 MBytes on a host of 300",
    sweep={"kernel": ["cloud-amd64"], "scan": [NONE, SLOW, FAST], "looks_up": ["no", "yes"]},
    where=lambda point: point["scan"] != FAST or point["looks_up"] == "yes",  # nothing is swapped
    slide=37,
    check=check,
    draw=draw,
    columns=["scan", "looks_up", "booted", "written", "in_file", "read", "looked_up", "alike",
             "merged", "ms"],
)  # fmt: skip
