"""A switch of address spaces costs a virtual TLB its whole working set.

Claim: after a load of CR3, a virtual TLB takes one hidden fault for each of the W pages that are
used; with shadows that are kept for each address space there are none; under extended page tables
there is no exit at all.

Source: lecture, "The “Virtual TLB” approach (7/7): synchronization points", "A reminder on shadow
page tables", "ISA extensions: memory virtualization (continued), benefits of EPT".

Control: using the same pages again, without a load of CR3, costs nothing under any technique.

Note: the guest goes to and fro between two address spaces; one page of each working set is that
of the code. Both spaces have been used before the switch that is counted.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.bare import FORMATS, TABLES, Tables, entry, mark
from understudy.lab.techniques import SHADOW, need, since, techniques, total
from understudy.vm import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW, DATA = 1 << 30, 0x40_0000
SECOND = TABLES + 0x10_0000  # where the second address space has its tables
TOUCH = (
    ("be 00 00 00 40", "mov esi,40000000h"),
    ("89 d1", "mov ecx,edx"),
    ("8b 06", "mov eax,[esi]"),
    ("81 c6 00 10 00 00", "add esi,1000h"),
    ("ff c9", "dec ecx"),
    ("75 f4", "jne -10"),
)
MARK = (("e7 f4", "out 0F4h,eax"),)
TO_FIRST = (("0f 22 df", "mov cr3,edi"),)
TO_SECOND = (("0f 22 db", "mov cr3,ebx"),)
PROGRAM = (
    *TOUCH, *TO_SECOND, *TOUCH, *TO_FIRST, *TOUCH, *MARK,
    *TO_SECOND, *TOUCH, *MARK,
    *TOUCH, *MARK,
)  # fmt: skip


def measure(paging: str, format: str, pages: int) -> dict[str, Any]:
    """Count one switch to an address space that was used before, and the use of its pages."""
    with VM("16M", paging=need(paging)) as vm:
        first, second = (Tables(vm.memory, format, at) for at in (TABLES, SECOND))
        for n in range(pages - 1):
            first.map(WINDOW + n * 0x1000, DATA)
            second.map(WINDOW + n * 0x1000, DATA + 0x1000)
        vm.memory.write(DATA, b"\1")
        vm.memory.write(DATA + 0x1000, b"\2")
        registers = {"rbx": second.root, "rdi": first.root, "rdx": pages - 1}
        vm.enter(entry(vm.memory, first, PROGRAM, **registers))
        seen = [mark(vm)]
        before = vm.counts()
        seen.append(mark(vm))
        switched = vm.counts()
        seen.append(mark(vm))
        again = since(vm.counts(), switched)
        counted = since(switched, before)
    if seen != [1, 2, 2]:
        raise RuntimeError(f"the guest read {seen}, expected [1, 2, 2]")
    return {
        "hidden_faults": counted["faults"]["hidden"],
        "cr3_exits": counted["exits"].get("CR_ACCESS", 0),
        "exits": total(counted["exits"]) - 1,
        "used_again": total(again["exits"]) - 1,
    }


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['paging']} {row['format']} {row['pages']}"


def check(table: Table) -> list[Bar]:
    """Exact."""

    def hidden(technique: str, words: str) -> Bar:
        return every(
            f"{technique}: {words}",
            table.where(paging=technique),
            lambda r: r["hidden_faults"],
            lambda r: r["pages"] if technique == "vtlb" else 0,
            name=name,
        )

    return [
        hidden("vtlb", "W hidden faults"),
        hidden("eager", "no hidden fault, the shadow was kept"),
        hidden("lazy", "no hidden fault, the shadow was kept"),
        every("without EPT, the load of CR3 itself is one exit, and there is no other",
              table.where(paging=SHADOW), lambda r: (r["cr3_exits"], r["exits"]),
              lambda r: (1, 1 + r["hidden_faults"]), name=name),
        every("ept: no exit at all", table.where(paging="ept"),
              lambda r: r["exits"], lambda r: 0, name=name),
        absent(every("the same pages again, without a load of CR3: no exit", table.rows,
              lambda r: r["used_again"], lambda r: 0, name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits over W, a line for each technique."""
    from understudy.lab.figure import lines, series

    rows = table.where(format="intel64") or table.rows
    points = series(rows, "paging", "pages", "exits")
    lines(figure.add_subplot(), points, "pages in use", "exits of one switch", log=True)


EXPERIMENT = Experiment(
    measure=measure,
    guest="two address spaces, used in turn; page tables built by hand",
    sweep={"paging": techniques(), "format": list(FORMATS), "pages": [2, 8, 32, 128, 400]},
    quick={"pages": [2, 32, 400]},
    slide=33,
    check=check,
    draw=draw,
)
