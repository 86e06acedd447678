"""A host that becomes short of memory asks its guest's balloon first, and swaps when it must.

Claim: a Debian on a host that has less memory than it writes files slowly, until it has more than
the host. While frames are few (the state "soft") its own driver gives pages, and nothing is
swapped out; later, when they are fewer, pages are. Without a balloon they are swapped out at once.
No byte of the files is another one afterwards, and at each moment all pages are of some kind.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Allocation
Policies": soft is for ballooning, hard for paging.

Control: if the host does not ask the balloon, nothing is in it.

Note: Debian's cloud kernel with a small user land. The figure is the guest's memory by kinds, each
second of virtual time.
"""

from typing import TYPE_CHECKING, Any, Final

from understudy.agent.steps import Unattended
from understudy.agent.unattended import whole
from understudy.clock import NS_PER_SECOND
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.kinds import over_time, record
from understudy.overcommit.accounts import Kind
from understudy.overcommit.terms import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY, RAM = "96M", "88M"
FILES, AT_ONCE, SIZE = 52, 28, 500_000
LONGEST_NS: Final = 600 * NS_PER_SECOND
BALLOON, SWAP = "balloon", "swap"
WRITE: Final = f"""mkdir /f; mount -t tmpfs -o size=90% f /f; cd /f; n=0
while [ $n -lt {FILES} ]; do head -c {SIZE} /dev/urandom > $n; md5sum $n >> /sums
[ $n -lt {AT_ONCE} ] || sleep 1; n=$((n+1)); done; md5sum -c /sums | grep -c OK"""
NEVER: Final = 1000  # seconds


def measure(kernel: str, means: str) -> dict[str, Any]:
    """Boot, write some files, and one more each second."""
    terms = Terms(is_always=True, scan=0, looks_up=False, balloons=means == BALLOON)
    with Host(pcpus=1, ram=RAM, overcommit=terms) as host:
        vm = host.linux(kernel, memory=MEMORY, name="vm", balloon=True)
        host.run(until=lambda: vm.session.channel.is_there, deadline_ns=LONGEST_NS)
        heard = bytearray()
        ended: list[int] = []
        Unattended(
            vm.session.channel, whole(WRITE.encode(), heard.extend, ended.append), vm.fail
        )  # fmt: skip
        row: dict[str, Any] = {"ballooned_from": NEVER, "swapped_from": NEVER}
        swap = host.stock.swap
        assert swap is not None
        row["swapped_before"] = swap.written
        while not ended and host.schedule.time.now() < LONGEST_NS:
            kinds, now = record(row, host.stock), row["moments"]
            if kinds[Kind.BALLOONED]:
                row["ballooned_from"] = min(row["ballooned_from"], now)
            if swap.written:
                row["swapped_from"] = min(row["swapped_from"], now)
            host.run(
                until=lambda: bool(ended), deadline_ns=host.schedule.time.now() + NS_PER_SECOND
            )  # fmt: skip
        last = record(row, host.stock)
        return row | {
            "right": int(heard or b"0"), "ballooned": last[Kind.BALLOONED],
            "swapped": last[Kind.SWAPPED], "written": swap.written,
        }  # fmt: skip


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['kernel']}, {row['means']}"


def check(table: Table) -> list[Bar]:
    """The order."""
    asked, blind = table.where(means=BALLOON), table.where(means=SWAP)
    return [
        every("all files are right", table, lambda r: r["right"], lambda r: FILES, name=name),
        every("at each moment all pages are of some kind", table,
              lambda r: r["off"], lambda r: 0, name=name),
        every("before anything is swapped out the balloon has pages", asked,
              lambda r: r["ballooned_from"] < r["swapped_from"], lambda r: True, name=name),
        every("pages are swapped out as well, at last", asked,
              lambda r: r["swapped_from"] < NEVER, lambda r: True, name=name),
        every("without the balloon pages are swapped out sooner", blind,
              lambda r: [r["swapped_from"] < a["swapped_from"] for a in asked],
              lambda r: [True for _ in asked], name=name),
        absent(every("and nothing is in it", blind, lambda r: r["ballooned_from"],
                     lambda r: NEVER, name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Kinds over time."""
    over_time(figure, [(row["means"], row) for row in table], 1)


EXPERIMENT = Experiment(
    measure=measure,
    guest="a Debian of 96 MBytes on a host of 88",
    sweep={"kernel": ["cloud-amd64"], "means": [BALLOON, SWAP]},
    slide=38,
    check=check,
    draw=draw,
    columns=["means", "right", "ballooned_from", "swapped_from", "ballooned", "swapped", "written"],
)
