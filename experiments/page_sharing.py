"""Identical guests share all but what is theirs alone.

Claim: of k guests with u frames that are each one's own, c frames that all have, and z frames of
zeros, k·u + c + 1 host frames are left, found in one scan; a write to a shared frame takes one
frame, and frames that were only hashed take none.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory".

Control: guests of different groups keep one set each.

Note: synthetic memory, without a guest that runs; the counts are frames.
"""

from typing import TYPE_CHECKING, Final

from understudy.arch.address import PAGE
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.sharing import Sharing, use

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, COMMON, ZERO = 64, 128, 64
ONE, APART = "one group", "a group each"
FRAMES: Final = OWN + COMMON + ZERO


def measure(guests: int, groups: str) -> Row:
    """Fill so many memories, scan once, write to one shared frame."""
    with Host((FRAMES * guests + 256) * PAGE) as host:
        memories, sharing = [], Sharing(host)
        for number in range(guests):
            memory = GuestMemory(host, FRAMES * PAGE)
            memory.spare.close()
            memory.populate()
            for gfn in range(OWN + COMMON):
                whose = number + 1 if gfn < OWN else 0
                memory.write(gfn * PAGE, bytes([whose, gfn]) + b"\1" * 100)
            sharing.join(memory.p2m, "" if groups == ONE else str(number))
            memories.append(memory)
        free = host.frames.free_count
        sharing.scan(FRAMES * guests)
        after = use(host, [memory.p2m for memory in memories])
        left = host.frames.free_count
        memories[0].write(OWN * PAGE, b"mine")
        row = {
            "seen": FRAMES * guests,
            "consumed": after.consumed,
            "shared": after.shared,
            "zero": after.zero,
            "saved": after.saved,
            "freed": left - free,
            "copies": left - host.frames.free_count,
        }
        for memory in memories:
            memory.close()
        return row


def form(guests: int) -> int:
    """The host frames that are left."""
    return guests * OWN + COMMON + 1


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['guests']} guests, {row['groups']}"


def check(table: Table) -> list[Bar]:
    """The closed form, exactly."""
    one = table.where(groups=ONE)
    return [
        every("k·u + c + 1 host frames are left", one,
              lambda r: r["consumed"], lambda r: form(r["guests"]), name=name),
        every("what is saved is free again", table,
              lambda r: r["freed"], lambda r: r["saved"], name=name),
        every("a write takes one frame, if the frame has become one that others have", table,
              lambda r: r["copies"],
              lambda r: int(r["guests"] > 1 and r["groups"] == ONE), name=name),
        absent(every("in groups of their own, guests share nothing but each its own zeros",
                     table.where(groups=APART), lambda r: r["consumed"],
                     lambda r: r["guests"] * form(1), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Host frames behind so many guests."""
    axes = figure.subplots()
    for groups in (ONE, APART):
        rows = list(table.where(groups=groups))
        axes.plot([r["guests"] for r in rows], [r["consumed"] for r in rows], "o-", label=groups)
    axes.set(xlabel="guests", ylabel="host frames")
    axes.legend()


EXPERIMENT = Experiment(
    measure=measure,
    guest="memory that is filled from outside",
    sweep={"guests": list(range(1, 11)), "groups": [ONE, APART]},
    slide=36,
    check=check,
    draw=draw,
    columns=["guests", "groups", "seen", "consumed", "shared", "zero", "saved", "copies"],
)
