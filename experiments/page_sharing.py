"""Identical guests share all but what is theirs alone.

Claim: of k guests with u frames that are each one's own, frames with d different contents that all
have, and frames of zeros, k·u + d + 1 host frames are left, found in one scan, for each k from 1 to
10. A write takes one frame if others have the frame, and none if it was only hashed, and no guest
but the one that writes sees it.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Sharing
Memory": of one machine some 12 % were reclaimed, 55 % of that zeros; of ten like it 67 % were
shared, and 60 % reclaimed.

Control: guests of different groups keep one set each.

Note: synthetic memory, without a guest that runs; the counts are frames. The mix is calibrated: it
was chosen so that k = 1 and k = 10 come near the paper's figures, and that they do predicts
nothing. The curve, to a frame, does. (No such mix meets both 67 and 60 %, for what is shared less
what is reclaimed is a tenth of d, some 5 % of a guest: each is missed by 0.8.)
"""

from typing import TYPE_CHECKING, Final

from understudy.arch.address import PAGE
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.sharing import Sharing, use

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, COMMON, ZERO = 338, 596, 66
DIFFERENT: Final = 542  # contents of the common frames: the first 54 are there twice
ONE, APART = "one group", "a group each"
FRAMES: Final = OWN + COMMON + ZERO
WRITTEN: Final = {"own": 0, "twice": OWN, "once": OWN + COMMON // 2, "zero": FRAMES - 1}
"""Guest frames that the first guest writes to at last, one of each sort."""
MINE: Final = b"mine"
PUBLISHED: Final = {1: {"reclaimed": 12, "zero": 55}, 10: {"shared": 67, "reclaimed": 60}}
"""Per cent: of all memory; zeros of what is reclaimed."""


def contents(number: int, gfn: int) -> bytes:
    """What a guest has in a frame."""
    if gfn >= OWN + COMMON:
        return bytes(PAGE)
    whose, what = (number + 1, gfn) if gfn < OWN else (0, (gfn - OWN) % DIFFERENT)
    return bytes([whose]) + what.to_bytes(2, "little") + bytes([1]) * (PAGE - 3)


def measure(guests: int, groups: str) -> Row:
    """Fill so many memories, scan once, write to a frame of each sort."""
    with Host((FRAMES * guests + 256) * PAGE) as host:
        memories, sharing = [], Sharing(host)
        for number in range(guests):
            memory = GuestMemory(host, FRAMES * PAGE)
            memory.spare.close()
            memory.populate()
            for gfn in range(OWN + COMMON):
                memory.write(gfn * PAGE, contents(number, gfn))
            sharing.join(memory.p2m, "" if groups == ONE else str(number))
            memories.append(memory)
        free = host.frames.free_count
        sharing.scan(FRAMES * guests)
        after = use(host, [memory.p2m for memory in memories])
        row = {
            "seen": FRAMES * guests,
            "consumed": after.consumed,
            "shared": after.shared,
            "zero": after.zero,
            "saved": after.saved,
            "freed": host.frames.free_count - free,
        }
        for sort, gfn in WRITTEN.items():
            left = host.frames.free_count
            memories[0].write(gfn * PAGE, MINE)
            row[f"copies_{sort}"] = left - host.frames.free_count
        row["wrong"] = 0
        for number, memory in enumerate(memories):
            for gfn in range(FRAMES):
                expected = contents(number, gfn)
                if not number and gfn in WRITTEN.values():
                    expected = MINE + expected[len(MINE) :]
                row["wrong"] += memory.read(gfn * PAGE, PAGE) != expected
        for memory in memories:
            memory.close()
        return row


def form(guests: int) -> int:
    """The host frames that are left."""
    return guests * OWN + DIFFERENT + 1


def others(guests: int) -> int:
    """The guest frames whose host frame others have, too."""
    return guests * (COMMON + ZERO) if guests > 1 else 2 * (COMMON - DIFFERENT) + ZERO


def percent(row: Row) -> dict[str, float]:
    """As the paper has it."""
    return {
        "shared": 100 * row["shared"] / row["seen"], "reclaimed": 100 * row["saved"] / row["seen"],
        "zero": 100 * (row["zero"] - 1) / row["saved"],
    }  # fmt: skip


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['guests']} guests, {row['groups']}"


def check(table: Table) -> list[Bar]:
    """The closed form, exactly; near the paper's figures, where the mix was chosen for that."""
    one = table.where(groups=ONE)
    return [
        every("k·u + d + 1 host frames are left", one,
              lambda r: r["consumed"], lambda r: form(r["guests"]), name=name),
        every("all frames but those of one's own are shared", one,
              lambda r: r["shared"], lambda r: others(r["guests"]), name=name),
        every("what is saved is free again", table,
              lambda r: r["freed"], lambda r: r["saved"], name=name),
        every("a write takes one frame, if the frame has become one that others have", table,
              lambda r: [r[f"copies_{sort}"] for sort in WRITTEN],
              lambda r: [0, 1, int(r["guests"] > 1 and r["groups"] == ONE), 1], name=name),
        every("nobody else sees it, and no byte of any guest is another one", table,
              lambda r: r["wrong"], lambda r: 0, name=name),
        every("calibrated: within a point of the paper's per cent, for one guest and for ten",
              [r for r in one if r["guests"] in PUBLISHED],
              lambda r: [what for what, at in PUBLISHED[r["guests"]].items()
                         if abs(percent(r)[what] - at) > 1],
              lambda r: [], name=name),
        absent(every("in groups of their own, guests share nothing but what each has twice",
                     table.where(groups=APART), lambda r: r["consumed"],
                     lambda r: r["guests"] * form(1), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """The curves, and the paper's figures at their ends."""
    left, right = figure.subplots(1, 2)
    for groups in (ONE, APART):
        rows = list(table.where(groups=groups))
        left.plot([r["guests"] for r in rows], [r["consumed"] for r in rows], "o-", label=groups)
    left.set(xlabel="guests", ylabel="host frames")
    left.legend()
    rows = list(table.where(groups=ONE))
    for what, color in (("shared", "C0"), ("reclaimed", "C1")):
        right.plot([r["guests"] for r in rows], [percent(r)[what] for r in rows], "o-", color=color,
                   label=what)  # fmt: skip
        at = {guests: told[what] for guests, told in PUBLISHED.items() if what in told}
        right.plot(list(at), list(at.values()), "x", color=color, label=f"{what}, published")
    right.set(xlabel="guests", ylabel="per cent of their memory")
    right.legend()


EXPERIMENT = Experiment(
    measure=measure,
    guest="memory that is filled from outside",
    sweep={"guests": list(range(1, 11)), "groups": [ONE, APART]},
    slide=36,
    check=check,
    draw=draw,
    columns=["guests", "groups", "seen", "consumed", "shared", "zero", "saved", "wrong"],
)
