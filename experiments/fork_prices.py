"""Fork and wait, under hardware and under software: what the ratio of 2006 says of the mix.

Claim: by the paper's prices hardware takes more than software for a fork, and the more the more
pages parent and child write: each is faults, of which hardware's are dear. With many pages the
ratio is the paper's 3.25; of a process that is next to nothing it is not.

Source: K. Adams and O. Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization", ASPLOS 2006, forkwait: 40,000 times, 6.0 s native, 36.9 s software, 106.4 s
hardware; lecture, "ISA extensions: the main motivations for hardware support".

Control: a fork in which nothing is written is too far from 3.25; so is a translator that does not
adapt, to which each write to a table is a fault; with extended page tables there is no exit at all.

Note: one round is a fork; the child writes all pages of its heap and exits; the parent waits, and
writes them as well. Counts are exact, cycles are counts times the paper's prices (of faults, of a
write to a table that translated code calls out, and a crossing in which nothing is done for all
else): that reproduces its arithmetic and measures nothing. The paper's seconds are solved by some
940 faults and 136 system calls a round; so its mix is of faults, as ours is with many pages. For
each fault our translator comes to the hypervisor three times more, for MOV from CR2, for INVLPG if
the page was there, and for IRET to the program. Native is the same kernel on a processor that never
was in VMX operation (lab/native.py); what it takes there is no overhead, so its cycles are 0.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, control, every, true
from understudy.lab import published as p
from understudy.lab.teaching import bare, booted, counted, kinds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NATIVE = "native"
TECHNIQUES = {
    NATIVE: (NATIVE, ""),
    "vmx, ept": ("vmx", "ept"), "vmx, eager": ("vmx", "eager"), "vmx, lazy": ("vmx", "lazy"),
    "bt, eager": ("bt", "eager"), "bt, lazy": ("bt", "lazy"), "pv": ("pv", "pv"),
}  # fmt: skip
HARDWARE, SOFTWARE = "vmx, eager", "bt, eager"
PAGES = (0, 16, 64, 256)
MANY = PAGES[-1]
KINDS = tuple(p.BY_SOFTWARE)
TO_LEARN, ROUNDS = 20, 10
NEAR = 0.15


def measure(technique: str, pages: int) -> dict[str, Any]:
    """What comes to the hypervisor in one round."""
    execution, paging = TECHNIQUES[technique]
    with bare() if technique == NATIVE else booted(execution, paging) as vm:
        if pages:
            counted(vm, "touch", pages)
        counted(vm, "cow", TO_LEARN)  # from now on each round is like the last
        before, after = counted(vm, "cow", 0), counted(vm, "cow", ROUNDS)
    less, more = kinds(before), kinds(after)
    found = {kind: (more[kind] - less[kind]) / ROUNDS for kind in more}
    prices = p.BY_HARDWARE if execution == "vmx" else p.BY_SOFTWARE
    return found | {"exits": sum(found.values()), "cycles": p.added(found, prices)}


EXPECTED = {
    **{(one, pages): (0, 0, 0, 0, 0) for one in (NATIVE, "vmx, ept") for pages in PAGES},
    ("vmx, eager", 0): (1, 3, 10, 0, 5), ("vmx, eager", 16): (33, 50, 43, 0, 37),
    ("vmx, eager", 64): (129, 194, 139, 0, 133), ("vmx, eager", 256): (513, 770, 865, 0, 517),
    ("vmx, lazy", 0): (1, 6, 5, 0, 5), ("vmx, lazy", 16): (33, 39, 38, 0, 37),
    ("vmx, lazy", 64): (129, 135, 134, 0, 133), ("vmx, lazy", 256): (513, 519, 518, 0, 517),
    ("bt, eager", 0): (1, 1, 11, 3, 27), ("bt, eager", 16): (33, 1, 44, 51, 123),
    ("bt, eager", 64): (129, 1, 140, 195, 411), ("bt, eager", 256): (513, 1, 865, 771, 1563),
    ("bt, lazy", 0): (1, 4, 6, 3, 27), ("bt, lazy", 16): (33, 5, 38, 51, 123),
    ("bt, lazy", 64): (129, 5, 134, 195, 411), ("bt, lazy", 256): (513, 5, 518, 771, 1563),
    **{("pv", pages): (2 * pages + 1, 0, 0, 0, 2 * pages + 9) for pages in PAGES},
}  # fmt: skip
"""Of P pages: 2 P + 1 true faults, P in the child and P in the parent, and one INVLPG less; a
write to a table for each, and one for each as fork takes the right to write; three loads of CR3.
A paravirtual kernel returns from each fault by a call, which has its writes with it; eight more.
"""


def check(table: Table) -> list[Bar]:
    """Counts exactly; the ratio within the tolerance of a macro-benchmark."""
    ratios = [ratio(table, pages) for pages in table.values("pages")]
    least, most = p.FORK_WAIT_RATIO * (1 - NEAR), p.FORK_WAIT_RATIO * (1 + NEAR)
    stubborn = ratio(table, MANY, adapts=False)
    return [
        every("the faults of a round, true, trace and hidden, writes called out, and all else are "
              "these", table, lambda r: tuple(r[kind] for kind in KINDS),
              lambda r: EXPECTED[r["technique"], r["pages"]], name=name),
        true("hardware takes more than software, and the more the more is written",
             ratios[0] > 1 and ratios == sorted(ratios), ", ".join(f"{one:.2f}" for one in ratios)),
        is_near(f"where {MANY} pages are written it is within 15 in 100 of the published one",
                ratios[-1], least, most),
        every("a paravirtual kernel comes to the hypervisor less often than any with shadow tables",
              [r for r in table if r["technique"] not in (NATIVE, "vmx, ept", "pv")],
              lambda r: table.where(technique="pv", pages=r["pages"])[0]["exits"] < r["exits"],
              lambda r: True, name=name),
        control("where nothing is written it is as well",
                is_near("the ratio", ratios[0], least, most)),
        control("if translated code did not adapt it would be as well",
                is_near("the ratio", stubborn, least, most)),
        absent(every("with extended page tables there is no exit, as without a hypervisor",
                     table.where(technique=("vmx, ept", NATIVE)), lambda r: r["exits"],
                     lambda r: 0, name=name)),
    ]  # fmt: skip


def ratio(table: Table, pages: int, *, adapts: bool = True) -> float:
    """What hardware adds to a round, by what software does."""
    hardware, software = (
        table.where(technique=one, pages=pages)[0] for one in (HARDWARE, SOFTWARE)
    )
    dearer = p.BY_SOFTWARE["trace"] - p.BY_SOFTWARE["called out"]
    more = 0 if adapts else software["called out"] * dearer
    return float(hardware["cycles"] / (software["cycles"] + more))


def is_near(statement: str, found: float, least: float, most: float) -> Bar:
    """Between the two."""
    return true(statement, least <= found <= most, f"{found:.2f}, of {least:.2f} to {most:.2f}")


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['pages']} pages under {row['technique']}"


def draw(table: Table, figure: "Figure") -> None:
    """The ratio, by pages."""
    from understudy.lab.figure import bars

    pages = table.values("pages")
    series = {
        "as it is": [ratio(table, one) for one in pages],
        "if each write were a fault": [ratio(table, one, adapts=False) for one in pages],
    }
    bars(figure.add_subplot(), [str(one) for one in pages], series, "hardware by software")


EXPERIMENT = Experiment(
    measure=measure,
    guest="the teaching kernel: fork, write, exit, wait, write",
    sweep={"technique": list(TECHNIQUES), "pages": list(PAGES)},
    columns=["technique", "pages", *KINDS, "exits", "cycles"],
    slide=77,
    check=check,
    draw=draw,
)
