"""What another guest has, too, need not be swapped out.

Claim: k guests have u frames that are each one's own, c that all have, and z of zeros; one of them
was scanned. When all frames of the others have to go, and each is looked up before, u of each
guest are in the swap file afterwards, and as many are read when they are needed again; without
looking, u + c are in the file, and all are read.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory": five Linux guests on a host that is overcommitted by 60 %.

Control: without looking, what all have is written as often as there are guests.

Note: synthetic memory, without a guest that runs; the counts are frames.
"""

from typing import TYPE_CHECKING, Final

from understudy.arch.address import PAGE
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.swap import Swap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, COMMON, ZERO = 64, 128, 64
FRAMES: Final = OWN + COMMON + ZERO
LOOKED, BLIND = "looked up", "not looked up"


def contents(number: int, gfn: int) -> bytes:
    """What a guest has in a frame."""
    if gfn >= OWN + COMMON:
        return bytes(PAGE)
    return bytes([number + 1 if gfn < OWN else 0, gfn]) + b"\1" * (PAGE - 2)


def measure(guests: int, victims: str) -> Row:
    """Swap all but the first guest out, and have them need everything again."""
    with Host((FRAMES * guests + 256) * PAGE) as host:
        memories, sharing = [], Sharing(host)
        for number in range(guests):
            memory = GuestMemory(host, FRAMES * PAGE)
            memory.spare.close()
            memory.populate()
            for gfn in range(OWN + COMMON):
                memory.write(gfn * PAGE, contents(number, gfn))
            sharing.join(memory.p2m)
            memories.append(memory)
        sharing.scan(FRAMES)
        size = FRAMES * guests * PAGE
        with Swap(host, size, sharing=sharing if victims == LOOKED else None) as swap:
            free = host.frames.free_count
            for memory in memories[1:]:
                swap.join(memory.p2m)
                swap.reclaim(memory.p2m, FRAMES)
            row = {
                "went": host.frames.free_count - free, "in_file": swap.in_file,
                "alike": swap.alike,
            }  # fmt: skip
            wrong = sum(
                memory.read(gfn * PAGE, PAGE) != contents(number, gfn)
                for number, memory in enumerate(memories) for gfn in range(FRAMES)
            )  # fmt: skip
            row |= {"read": swap.read, "wrong": wrong}
        for memory in memories:
            memory.close()
        return row


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['guests']} guests, {row['victims']}"


def check(table: Table) -> list[Bar]:
    """The closed form, exactly."""
    looked, blind = table.where(victims=LOOKED), table.where(victims=BLIND)
    return [
        every("all frames of all but one guest went", table,
              lambda r: r["went"], lambda r: (r["guests"] - 1) * FRAMES, name=name),
        every("no byte is another one afterwards", table,
              lambda r: r["wrong"], lambda r: 0, name=name),
        every("looked up, u frames of each are in the file", looked,
              lambda r: r["in_file"], lambda r: (r["guests"] - 1) * OWN, name=name),
        every("and as many are read again", looked,
              lambda r: r["read"], lambda r: (r["guests"] - 1) * OWN, name=name),
        absent(every("not looked up, u + c of each are", blind, lambda r: r["in_file"],
                     lambda r: (r["guests"] - 1) * (OWN + COMMON), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Frames in the swap file."""
    axes = figure.subplots()
    for victims in (LOOKED, BLIND):
        rows = list(table.where(victims=victims))
        axes.plot([r["guests"] for r in rows], [r["in_file"] for r in rows], "o-", label=victims)
    axes.set(xlabel="guests", ylabel="frames in the swap file")
    axes.legend()


EXPERIMENT = Experiment(
    measure=measure,
    guest="memory that is filled from outside",
    sweep={"guests": [2, 3, 5, 8], "victims": [LOOKED, BLIND]},
    slide=37,
    check=check,
    draw=draw,
    columns=["guests", "victims", "went", "alike", "in_file", "read", "wrong"],
)
