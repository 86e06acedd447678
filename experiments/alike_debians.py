"""Debians that are alike have much of their memory in common, and more with each one more.

Claim: of k Debians that were booted each for itself, two scans make so many pages others' that what
is reclaimed grows with each guest; a write to a page that several have is one exit and one copy (of
the last one that has it, one exit), and pages that were only hashed cost none; large pages are
split where pages are shared, and nothing else changes by their size.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory": ten Linux machines of 40 MBytes shared 67 % of their memory and 60 % of it was reclaimed;
of a single one 12 %, most of it zeros.

Control: in a group of its own, each shares nothing but its own.

Note: Debian's cloud kernel with a small user land, 96 MBytes each, idle after its boot; what nobody
has touched is zero, and is shared, too. All counts are of virtual time, and exact.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from understudy.arch.exit_reason import Reason
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every, true
from understudy.machine.p2m import P2m
from understudy.machine.words import Flag
from understudy.overcommit.sharing import Sharing, use

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY, SCANS = "96M", 2
ONE, APART = "one group", "a group each"
LONGEST_NS = 600_000_000_000
LATER_NS = 1_000_000_000
PUBLISHED = {1: 12, 10: 60}  # per cent reclaimed


def measure(kernel: str, guests: int, groups: str, largest_page: str) -> dict[str, Any]:
    """Boot them, scan twice, let them run for a second."""
    with Host(pcpus=2, ram=f"{guests * 128 + 64}M") as host:
        vms = [
            host.linux(kernel, memory=MEMORY, name=f"vm{n}", largest_page=largest_page)
            for n in range(guests)
        ]
        now, p2ms = host.schedule.time.now, [vm.memory.p2m for vm in vms]
        host.run(
            until=lambda: all(vm.session.channel.is_there for vm in vms), deadline_ns=LONGEST_NS
        )
        tables = sum(vm.pages.table_count for vm in vms)
        sharing, pages = Sharing(host), sum(vm.memory.pages for vm in vms)
        for number, p2m in enumerate(p2ms):
            sharing.join(p2m, "" if groups == ONE else str(number))
        for _ in range(SCANS):
            sharing.scan(pages)
        found = use(host, p2ms)
        split = sum(vm.pages.table_count for vm in vms) - tables
        before, copied, had = _violations(vms), host.copied, _shared(p2ms)
        host.run(deadline_ns=now() + LATER_NS)
        return {
            "booted": sum(vm.session.channel.is_there for vm in vms), "pages": pages,
            "shared": found.shared, "zero": found.zero, "saved": found.saved,
            "shared_percent": round(100 * found.shared / pages, 1),
            "reclaimed_percent": round(100 * found.saved / pages, 1),
            "split": split, "exits": _violations(vms) - before, "copies": host.copied - copied,
            "ended": had - _shared(p2ms),
        }  # fmt: skip


def _violations(vms: list[Any]) -> int:
    return sum(vm.counts()["exits"].get(Reason.EPT_VIOLATION.name, 0) for vm in vms)


def _shared(p2ms: list[P2m]) -> int:
    """Guest frames of which somebody wants to hear before they are written."""
    return sum(n for p2m in p2ms for _, word, n in p2m.pieces() if word & Flag.SHARED)


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['guests']} {row['kernel']}, {row['groups']}, {row['largest_page']}"


def check(table: Table) -> list[Bar]:
    """More with each; one exit and one copy."""
    one = table.where(groups=ONE)
    bars = [
        every("all boot", table, lambda r: r["booted"], lambda r: r["guests"], name=name),
        every("a write to a shared page is one exit, and no other write is any", table,
              lambda r: r["exits"], lambda r: r["ended"], name=name),
        every("and one copy at most", table, lambda r: r["copies"] <= r["ended"],
              lambda r: True, name=name),
        every("some were written", one, lambda r: r["copies"] > 0, lambda r: True, name=name),
        every("large pages are split to share", one, lambda r: r["split"] > 0,
              lambda r: r["largest_page"] != "4K", name=name),
    ]  # fmt: skip
    for size in table.values("largest_page"):
        rows = sorted(
            table.where(groups=ONE, largest_page=size), key=lambda r: int(r["guests"])
        )  # fmt: skip
        grows = [a["reclaimed_percent"] < b["reclaimed_percent"] for a, b in pairwise(rows)]
        said = ", ".join(f"{r['guests']}: {r['reclaimed_percent']} %" for r in rows)
        bars.append(true(f"with each one more is reclaimed ({size})", all(grows), said))
    apart, alone = table.where(groups=APART), {
        (r["kernel"], r["largest_page"]): r["saved"] for r in table.where(groups=ONE, guests=1)
    }  # fmt: skip
    bars.append(absent(every(
        "in groups of their own, none has anything of another", apart,
        lambda r: r["saved"] <= r["guests"] * alone.get((r["kernel"], r["largest_page"]), 0) * 1.02,
        lambda r: True, name=name,
    )))  # fmt: skip
    return bars


def draw(table: Table, figure: "Figure") -> None:
    """Beside the published figures."""
    axes = figure.subplots()
    rows = sorted(table.where(groups=ONE, largest_page="1G"), key=lambda r: r["guests"])
    for what in ("shared_percent", "reclaimed_percent"):
        axes.plot([r["guests"] for r in rows], [r[what] for r in rows], "o-",
                  label=what.replace("_percent", ""))  # fmt: skip
    axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "x", label="reclaimed, published")
    axes.set(xlabel="guests", ylabel="per cent of their memory")
    axes.legend()


EXPERIMENT = Experiment(
    measure=measure,
    guest="Debians of 96 MBytes on one host",
    sweep={
        "kernel": ["cloud-amd64"], "guests": list(range(1, 11)), "groups": [ONE, APART],
        "largest_page": ["1G", "4K"],
    },
    quick={"guests": [1, 2], "largest_page": ["1G"]},
    slide=36,
    check=check,
    draw=draw,
    columns=["guests", "groups", "largest_page", "pages", "shared_percent", "reclaimed_percent",
             "zero", "saved", "split", "exits", "ended", "copies"],
)  # fmt: skip
