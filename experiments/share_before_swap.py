"""Five Debians on a host of little more than half their memory: what they have alike stays there.

Claim: five Linux guests boot on a host that is overcommitted by 60 %. If their pages are scanned,
and each is looked up before it is swapped out, so that it is shared if another one is like it, less
goes to the swap file, and less is read from it, than if they are not; and all boot in either case.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory": five machines on a host overcommitted by 60 % wrote less than 20 MBytes after their boot.

Control: without that, no frame becomes another's.

Note: Debian's cloud kernel with a small user land, 96 MBytes each; 50,000 pages a second of virtual
time are scanned, for a boot takes six. To look up what nobody has scanned finds hardly anything:
what is not shared is gone.
"""

from typing import TYPE_CHECKING, Any

from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every, true
from understudy.overcommit.terms import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUESTS, MEMORY, RAM = 5, "96M", "300M"  # 480 MBytes, 1.6 times as many
LOOKED, BLIND = "scanned and looked up", "neither"
LONGEST_NS = 600_000_000_000


def measure(kernel: str, victims: str) -> dict[str, Any]:
    """Boot them all at once."""
    looks_up = victims == LOOKED
    terms = Terms(scan=50_000 if looks_up else 0, looks_up=looks_up, balloons=False)
    with Host(pcpus=2, ram=RAM, overcommit=terms) as host:
        vms = [host.linux(kernel, memory=MEMORY, name=f"vm{n}") for n in range(GUESTS)]
        host.run(
            until=lambda: all(vm.session.channel.is_there for vm in vms), deadline_ns=LONGEST_NS
        )
        swap, sharing = host.stock.swap, host.stock.sharing
        assert swap is not None
        return {
            "booted": sum(vm.session.channel.is_there for vm in vms), "written": swap.written,
            "shared": sharing.merged if sharing is not None else 0, "in_file": swap.in_file,
            "read": swap.read, "ms": host.schedule.time.now() // 1_000_000,
        }  # fmt: skip


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['kernel']}, {row['victims']}"


def check(table: Table) -> list[Bar]:
    """What went to the file."""
    looked, blind = table.where(victims=LOOKED), table.where(victims=BLIND)
    pairs = list(zip(looked, blind, strict=False))

    def less(words: str, column: str) -> Bar:
        found = ", ".join(f"{a[column]} and {b[column]}" for a, b in pairs)
        return true(words, all(a[column] < b[column] for a, b in pairs) if pairs else None, found)

    return [
        every("all boot", table, lambda r: r["booted"], lambda r: GUESTS, name=name),
        less("scanned and looked up, less is in the file afterwards", "in_file"),
        less("and less was read from it", "read"),
        every("frames became others' instead", looked, lambda r: r["shared"] > 0, lambda r: True,
              name=name),
        absent(every("without, none became another's", blind, lambda r: r["shared"],
                     lambda r: 0, name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Pages, both ways."""
    from understudy.lab.figure import bars

    counts, rows = ("written", "in_file", "read", "shared"), list(table)
    series = {row["victims"]: [row[what] for what in counts] for row in rows}
    bars(figure.add_subplot(), [what.replace("_", " ") for what in counts], series, "pages")


EXPERIMENT = Experiment(
    measure=measure,
    guest="five Debians of 96 MBytes on a host of 300",
    sweep={"kernel": ["cloud-amd64"], "victims": [LOOKED, BLIND]},
    slide=37,
    check=check,
    draw=draw,
)
