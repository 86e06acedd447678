"""Caches in the walker turn 24 references into four, and those into one.

Claim: a nested TLB takes the host's dimension out of the walk (24 references become 4), a
paging-structure cache takes the guest's upper levels out (4 become 1). What remains on accesses
that defeat the TLB is about 1.5 references for each walk natively and 4.4 in a virtual machine.

Source: R. Bhargava et al., "Accelerating Two-Dimensional Page Walks for Virtualized Systems",
ASPLOS 2008 (the caches); C. H. Park et al., "Every Walk's a Hit", ASPLOS 2022, abstract (1.5 and
4.4); SDM 3A, "Paging-Structure Caches".

Control: with both caches off every walk takes 24 references, or 4 natively, whatever came before;
and the native number must not fit the virtual machine's.

Note: the trace is 40 000 loads from pages chosen evenly at random out of 128 MBytes of addresses.
The published averages are over other programs, so the trace is calibrated: 32 cached directory
entries reach half of the addresses, which gives the native 1.5; the addresses are four mappings of
the same 32 MBytes, of which a nested TLB of 2048 entries knows a quarter, which gives the virtual
machine's number. With one mapping for each frame it is 5.5, which the table shows, too. A quarter
off is allowed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, control, every, true
from understudy.lab.bare import CODE, Tables, entry
from understudy.silicon import Memory, Processor
from understudy.vm import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW, REGION, DATA = 1 << 30, 128 << 20, 16 << 20
LOADS = 40_000
PROGRAM = (
    ("90", "nop"),
    ("8b 03", "mov eax,[ebx]"),
    ("8b 83 00 10 00 00", "mov eax,[ebx+1000h]"),
    ("8b 83 00 20 00 00", "mov eax,[ebx+2000h]"),
    # the next random number; bits of its upper half choose a page
    ("69 c0 0d 66 19 00", "imul eax,19660Dh"),
    ("05 5f f3 6e 3c", "add eax,3C6EF35Fh"),
    ("89 c2", "mov edx,eax"),
    ("c1 ea 04", "shr edx,4"),
    ("21 f2", "and edx,esi"),
    ("8b 14 13", "mov edx,[ebx+edx]"),
    ("ff c9", "dec ecx"),
    ("75 e7", "jne -23"),
    ("e6 f4", "out 0F4h,al"),
)
STEPS = (CODE + 1, CODE + 3, CODE + 9, CODE + 15)
NATIVE, VIRTUAL = 1.5, 4.4  # published averages
STATED = {"structures": 32, "nested": 2048, "names": 4}


def measure(walk: str, structures: int, nested: int, names: int) -> dict[str, Any]:
    """Three loads one by one, then the trace."""
    with ExitStack() as stack:
        if walk == "native":
            memory = Memory(DATA + REGION)
            processor = Processor(memory)
            registers = prepare(memory, names)
            processor.set_registers(registers)

            def run(budget: int) -> None:
                processor.run(budget)

        else:
            vm = stack.enter_context(VM(DATA + REGION, largest_page=walk))
            processor = vm.processors[0]
            vm.vcpus[0].guest.set_registers(prepare(vm.memory, names))

            def run(budget: int) -> None:
                vm.go(budget=budget or None)

        return observe(processor, run, structures, nested)


def prepare(memory: Any, names: int) -> dict[str, int]:
    """The tables and the program; returns the registers to begin with."""
    tables = Tables(memory, "intel64")
    for offset in range(0, REGION, 0x1000):
        tables.map(WINDOW + offset, DATA + offset % (REGION // names))
    tables.map(WINDOW + 0x2000, DATA)  # another name for the first frame
    registers = {"rax": 1, "rbx": WINDOW, "rcx": LOADS, "rsi": REGION - 0x1000}
    return dict(entry(memory, tables, PROGRAM, **registers).registers)


def observe(
    processor: Processor, run: Callable[[int], None], structures: int, nested: int
) -> dict[str, Any]:
    """Count the references of the first three loads and of the trace."""
    while processor.registers()["rip"] != STEPS[0]:
        run(1)
    processor.set_walk_caches(0, 0)
    processor.set_walk_caches(structures, nested)  # empty ones
    single = []
    for at in STEPS[1:]:
        before = references(processor)
        while processor.registers()["rip"] != at:
            run(1)
        single.append(references(processor) - before)
    before, misses = references(processor), processor.counters()["tlb_misses"]
    run(0)
    walks = processor.counters()["tlb_misses"] - misses
    caches = processor.counters()["walk_caches"]
    return {
        "first": single[0],
        "next_page": single[1],
        "other_name": single[2],
        "walks": walks,
        "trace_references": references(processor) - before,
        "average": (references(processor) - before) / walks,
        "structure_hits": sum(caches["structures"]["hits"].values()),
        "nested_hits": caches["nested"]["hits"],
    }


def references(processor: Processor) -> int:
    """All references so far."""
    return sum(n for levels in processor.counters()["walk"].values() for n in levels.values())


def exists(point: Row) -> bool:
    """A nested TLB is for guests; so only there it matters how many names a frame has."""
    if point["walk"] == "native":
        return bool(point["nested"] == 0 and point["names"] == 4)
    return bool(point["names"] == 4 or point["nested"] == STATED["nested"])


def foretold(row: Row) -> tuple[int, int, int]:
    """References of: the first load; one of the next page; one of the first frame's other name."""
    tables = 1 if row["structures"] else 4
    if row["walk"] == "native":
        return 4, tables, tables
    if row["structures"]:  # the directory entry's cache holds a host-physical address
        return 24, 1 + 4, 1 + (0 if row["nested"] else 4)
    return (24, 4 + 4, 4) if row["nested"] else (24, 24, 24)


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['walk']}, {row['structures']} and {row['nested']} entries, {row['names']} names"


def check(table: Table) -> list[Bar]:
    """The single loads exactly; the averages of the trace within a quarter."""
    exact = table.where(walk=("native", "4K"))
    plain = table.where(structures=0, nested=0, walk=("native", "4K"))
    native = table.where(walk="native", structures=STATED["structures"])
    virtual = table.where(walk="4K", **STATED)
    return [
        every(
            "first load, next page, the first frame's other name: to the last reference",
            exact,
            lambda r: (r["first"], r["next_page"], r["other_name"]),
            foretold,
            name=name,
        ),
        every(
            "on the trace, between 1 and 24 references a walk",
            table.rows,
            lambda r: 1 <= r["average"] <= 24,
            lambda r: True,
            name=name,
        ),
        near("native, with the stated caches: 1.5 a walk", native, NATIVE),
        near("in the virtual machine, with the stated caches: 4.4 a walk", virtual, VIRTUAL),
        absent(
            every(
                "without caches every walk of the trace takes 24, natively 4",
                plain,
                lambda r: r["trace_references"],
                lambda r: r["walks"] * (4 if r["walk"] == "native" else 24),
                name=name,
            )
        ),
        control("the native walk is not the virtual machine's", near("", native, VIRTUAL)),
    ]


def near(statement: str, rows: list[dict[str, Any]], published: float) -> Bar:
    """Within a quarter of a published average."""
    found = [row["average"] for row in rows]
    holds = all(abs(n / published - 1) <= 0.25 for n in found) if found else None
    return true(statement, holds, ", ".join(f"{n:.2f}" for n in found) or "not measured")


def draw(table: Table, figure: "Figure") -> None:
    """References for each walk of the trace, by what is on."""
    from understudy.lab.figure import bars

    axes = figure.add_subplot()
    sets = list(dict.fromkeys((r["structures"], r["nested"]) for r in table.rows))
    words = {"native": "native", "4K": "EPT, 4K pages", "2M": "EPT, 2M pages"}

    def average(walk: str, structures: int, nested: int) -> float | None:
        rows = table.where(walk=walk, structures=structures, nested=nested, names=4)
        return rows[0]["average"] if rows else None

    series = {
        words[walk]: [average(walk, structures, nested) for structures, nested in sets]
        for walk in table.values("walk")
    }
    labels = [
        f"structures {'on' if structures else 'off'}\nnested {nested or 'off'}"
        for structures, nested in sets
    ]
    bars(axes, labels, series, "references for each walk")


EXPERIMENT = Experiment(
    measure=measure,
    guest="three loads, then 40 000 loads at random from 128 MBytes; 64-bit code",
    sweep={"walk": ["native", "4K", "2M"], "structures": [0, 32], "nested": [0, 64, 2048],
           "names": [1, 4]},
    quick={"walk": ["native", "4K"], "nested": [0, 2048]},
    where=exists,
    slide=66,
    check=check,
    draw=draw,
    columns=["walk", "structures", "nested", "names", "first", "next_page", "other_name", "walks",
             "average", "structure_hits", "nested_hits"],
)  # fmt: skip
