"""K writes to a page table cost K exits, one, or none.

Claim: a guest that writes K entries of one page table takes K exits where every update is traced,
one exit where the first write unprotects the table, and none under a virtual TLB or extended page
tables.

Source: lecture, "How to efficiently manage shadow page tables?", "The “lazy shadow update” approach
(1/3)", "The “Virtual TLB” approach (2/7)", "ISA extensions: memory virtualization (continued),
benefits of EPT".

Control: the same writes to a page that is no table cost none under any technique; and after CR3 is
loaded again, the guest must see what it mapped.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.bare import FORMATS, TABLES_END, Tables, entry, mark
from understudy.lab.techniques import need, since, techniques, total
from understudy.vm import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW = 1 << 30
OLD, NEW = 0x40_0000, 0x80_0000  # frames before and after the writes
PROGRAM = (
    ("be 00 00 00 40", "mov esi,40000000h"),
    ("8b 06", "mov eax,[esi]"),  # the table is used
    ("8b 03", "mov eax,[ebx]"),  # and read
    ("e6 f4", "out 0F4h,al"),
    ("b8 63 00 80 00", "mov eax,800063h"),
    ("89 03", "mov [ebx],eax"),
    ("05 00 10 00 00", "add eax,1000h"),
    ("01 d3", "add ebx,edx"),
    ("ff c9", "dec ecx"),
    ("75 f3", "jne -11"),
    ("e6 f4", "out 0F4h,al"),
    ("0f 22 df", "mov cr3,edi"),
    ("8b 06", "mov eax,[esi]"),
    ("e7 f4", "out 0F4h,eax"),
)
EVERY = -1
TRAPS = {"eager": EVERY, "lazy": 1, "vtlb": 0, "ept": 0}  # for K writes


def measure(paging: str, format: str, target: str, writes: int) -> dict[str, Any]:
    """Count what happens between the marks around the writes."""
    with VM("16M", paging=need(paging)) as vm:
        tables = Tables(vm.memory, format)
        for n in range(writes):
            tables.map(WINDOW + n * 0x1000, OLD + n * 0x1000)
        vm.memory.write(OLD, b"\1\0\0\0")
        vm.memory.write(NEW, b"\2\0\0\0")
        at = tables.entry(WINDOW) if target == "table" else TABLES_END - 0x1000
        registers = {"rbx": at, "rcx": writes, "rdx": tables.layout.entry_bytes}
        vm.enter(entry(vm.memory, tables, PROGRAM, rdi=tables.root, **registers))
        mark(vm)
        before = vm.counts()
        mark(vm)
        counted = since(vm.counts(), before)
        seen = mark(vm)
    exits = counted["exits"]
    return {
        "traps": counted["faults"]["trace"],
        "hidden_faults": counted["faults"]["hidden"],
        "exits": total(exits) - 1,  # less the mark itself
        "for_each_write": (total(exits) - 1) / writes,
        "seen": {1: "old", 2: "new"}.get(seen, str(seen)),
    }


def exists(point: Row) -> bool:
    """The control takes one size."""
    return bool(point["target"] == "table" or point["writes"] == 64)


def foretold(row: Row) -> tuple[int, int]:
    """Trace faults, and exits in all."""
    traps = TRAPS[row["paging"]]
    return (row["writes"],) * 2 if traps == EVERY else (traps,) * 2


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['paging']} {row['format']} {row['writes']}"


def check(table: Table) -> list[Bar]:
    """Exact."""
    bars = [
        every(
            f"{technique}: {words}",
            table.where(paging=technique, target="table"),
            lambda r: (r["traps"], r["exits"]),
            foretold,
            name=name,
        )
        for technique, words in (
            ("eager", "K writes, K exits, all of them trace faults"),
            ("lazy", "one exit, a trace fault, whatever K is"),
            ("vtlb", "no exit"),
            ("ept", "no exit"),
        )
    ]
    return [
        *bars,
        absent(every(
            "writes to a page that is no table cost no exit",
            table.where(target="data"), lambda r: r["exits"], lambda r: 0, name=name,
        )),
        every(
            "after MOV to CR3 the guest sees what it mapped",
            table.rows, lambda r: r["seen"],
            lambda r: "new" if r["target"] == "table" else "old", name=name,
        ),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Exits over K, a line for each technique."""
    from understudy.lab.figure import lines, series

    rows = table.where(target="table", format="intel64") or table.where(target="table")
    points = series(rows, "paging", "writes", "exits")
    lines(figure.add_subplot(), points, "writes to one page table", "exits", log=True)


EXPERIMENT = Experiment(
    measure=measure,
    guest="a loop of MOVs into a page table in use; page tables built by hand",
    sweep={
        "paging": techniques(),
        "format": list(FORMATS),
        "target": ["table", "data"],
        "writes": [1, 8, 64, 512],
    },
    quick={"writes": [1, 64, 512]},
    where=exists,
    slide=24,
    check=check,
    draw=draw,
)
