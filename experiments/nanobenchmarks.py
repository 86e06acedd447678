"""Seven operations of a kernel, under software and under hardware techniques, as in 2006.

Claim: translated code does without exits where hardware of 2006 had one, and pays where hardware
has none: for ports, page faults and writes to page tables software takes less, for system calls,
calls and divide errors hardware does. Extended page tables leave an exit for a port alone, and for
CR8.

Source: K. Adams and O. Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization", ASPLOS 2006, nanobenchmarks (FrobOS); lecture, "Dealing with problematic ISAs",
"ISA extensions: the main motivations for hardware support".

Control: with the prices of the two exchanged the order is lost; with extended page tables no
operation on memory exits.

Note: what is counted is how often the hypervisor had the processor. Cycles are these counts times
the paper's prices: that reproduces its arithmetic, and measures nothing. Where ours comes to the
hypervisor more often than theirs, the table says what it costs: our translator traps for IN, for
MOV CR8, and for an IRET that changes RF (theirs has code for them), and our VMX has no shadow of
the task priority, so CR8 exits. 100 writes to one table are 100 exits if each is traced, one if
the first unprotects the table, one call of a paravirtual kernel. Translated code adapts: an
instruction that has trapped eight times is called out, and traps no more. Native is the same kernel
on a processor that never was in VMX operation (lab/native.py). A port access leaves it for the bus
as well, which is no exit.
"""

from typing import TYPE_CHECKING, Any, Final

from understudy.lab import Bar, Experiment, Row, Table, absent, control, every
from understudy.lab import published as p
from understudy.lab.teaching import bare, between, booted, counted, executed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NATIVE = "native"
TECHNIQUES = {
    NATIVE: (NATIVE, ""),
    "vmx, ept": ("vmx", "ept"), "vmx, eager": ("vmx", "eager"), "vmx, lazy": ("vmx", "lazy"),
    "vmx, vtlb": ("vmx", "vtlb"), "deprivileged, lazy": ("deprivileged", "lazy"),
    "bt, eager": ("bt", "eager"), "bt, lazy": ("bt", "lazy"), "pv": ("pv", "pv"),
}  # fmt: skip
HARDWARE, SOFTWARE = "vmx, eager", "bt, eager"
"""The pair that is weighed: both trace every write, as the paper's hardware VMM does."""
SHADOW = ("vmx, eager", "vmx, lazy", "vmx, vtlb")
OPERATIONS = ("syscall", "in", "cr8wr", "callret", "pgfault", "divzero", "ptemod")
TIMES = 100
FAULT, TWO = TIMES, 2 * TIMES
NO_MMU = {"syscall": 0, "in": TIMES, "cr8wr": TIMES, "callret": 0, "divzero": 0}
BY_TRAPS = {"in": TIMES, "cr8wr": TIMES, "callret": 0, "divzero": TWO, "pgfault": FAULT + TIMES}
EXITS: dict[str, dict[str, int]] = {
    NATIVE: dict.fromkeys(OPERATIONS, 0),
    "vmx, ept": NO_MMU | {"pgfault": 0, "ptemod": 0},
    "vmx, eager": NO_MMU | {"pgfault": FAULT, "ptemod": TIMES},
    "vmx, lazy": NO_MMU | {"pgfault": FAULT, "ptemod": 1},
    "vmx, vtlb": NO_MMU | {"pgfault": FAULT, "ptemod": 0},
    "deprivileged, lazy": BY_TRAPS | {"syscall": 6 * TIMES, "ptemod": 1},
    "bt, eager": BY_TRAPS | {"syscall": 3 * TIMES, "ptemod": TIMES},
    "bt, lazy": BY_TRAPS | {"syscall": 3 * TIMES, "ptemod": 1},
    "pv": BY_TRAPS | {"syscall": TWO, "ptemod": 1},
}
"""For a hundred times.  A system call: INT, MOV from CR2, IRET, and without translation PUSHF, CLI,
STI; a divide error or page fault: the event, and the IRET of its handler, or a call.
"""
STORES = {64: 1, 32: 2}
"""How many it takes to write an entry of 8 bytes: each is traced."""
BEYOND = {64: 24, 32: 22}
"""Instructions that translation adds to a call and its return."""
TRAPS: Final = 8 - 1
"""Of an instruction, before it is called out; one of them came when the kernel began."""


def measure(technique: str, operation: str, bits: int) -> dict[str, Any]:
    """What comes to the hypervisor in a hundred times, by kind; and what once would cost."""
    execution, paging = TECHNIQUES[technique]
    what = "call" if operation == "syscall" else operation
    with bare(bits) if technique == NATIVE else booted(execution, paging, bits) as vm:
        first = counted(vm, what, TIMES)  # tables are there, and translations
        found = between(vm, what, 0, TIMES)
        own, all_of_them = executed(vm, what)
    added = {"instructions": own}
    if operation == "callret":
        added["beyond"] = all_of_them - own
    cycles = weighed(operation, found, execution)
    at_first = first["faults"].get("trace", 0)
    return found | {"exits": sum(found.values()), "cycles": cycles, "at first": at_first} | added


def weighed(operation: str, found: Row, execution: str) -> float:
    """Cycles for one time, by the paper's prices."""
    native, hardware = p.NATIVE[operation], p.HARDWARE[operation]
    if execution == NATIVE:
        return native
    each = {kind: found[kind] / TIMES for kind in p.BY_SOFTWARE}
    if execution == "vmx":
        exits = operation in ("in", "pgfault", "ptemod")  # in the paper
        prices = p.BY_HARDWARE | ({"other": hardware - native} if operation == "in" else {})
        return (native if exits else hardware) + p.added(each, prices)
    if operation in ("in", "cr8wr"):  # carried out: the processor executes none
        return p.added(each, p.BY_SOFTWARE)
    is_longer = operation == "callret" and execution == "bt"
    return (p.SOFTWARE["callret"] if is_longer else native) + p.added(each, p.BY_SOFTWARE)


def check(table: Table) -> list[Bar]:
    """Counts exactly; the published figures where the counts are the paper's; the order."""

    def row(technique: str, like: Row, operation: str = "") -> Row:
        return table.where(
            technique=technique, operation=operation or like["operation"], bits=like["bits"]
        )[0]

    def expected(r: Row) -> int:
        stores = STORES[r["bits"]] if "eager" in r["technique"] else 1
        return EXITS[r["technique"]][r["operation"]] * (stores if is_write(r) else 1)

    def is_write(r: Row) -> bool:
        return bool(r["operation"] == "ptemod")

    def is_carried_out(r: Row) -> bool:  # by the hypervisor: the processor has not retired it
        return bool(r["operation"] == "cr8wr" and r["technique"] != NATIVE)

    hardware, software = table.where(technique=HARDWARE), table.where(technique=SOFTWARE)
    as_published = [r for r in hardware if r["operation"] != "cr8wr"
                    and not (is_write(r) and r["bits"] == 32)]  # fmt: skip
    faults = [r for r in table.where(operation="pgfault") if r["technique"] != "vmx, ept"]
    returns = [r for r in software if r["operation"] in ("divzero", "pgfault")]
    writes = table.where(technique=("vmx, eager", "bt, eager"), operation="ptemod")
    memory = [r for r in table.where(technique="vmx, ept") if r["operation"] not in ("in", "cr8wr")]

    def software_is_first(r: Row, prices: str = "") -> bool:
        ours, theirs, operation = row(SOFTWARE, r), row(HARDWARE, r), str(r["operation"])
        if prices == "exchanged":
            return bool(weighed(operation, ours, "vmx") < weighed(operation, theirs, "bt"))
        return bool(ours["cycles"] < theirs["cycles"])

    return [
        every("the hypervisor gets the processor so often in a hundred times", table,
              lambda r: r["exits"], expected, name=name),
        every("the kernel, if not pv's, executes what it does without a hypervisor, no more",
              [r for r in table if r["technique"] != "pv"], lambda r: r["instructions"],
              lambda r: row(NATIVE, r)["instructions"] - is_carried_out(r), name=name),
        every("under VMX with traced tables, counts times prices come to what was published, to 1%",
              as_published, lambda r: abs(r["cycles"] / p.HARDWARE[r["operation"]] - 1) <= 0.01,
              lambda r: True, name=name),
        every("software is first for in, cr8wr, pgfault, ptemod; hardware for the others", software,
              software_is_first, lambda r: r["operation"] in p.SOFTWARE_FIRST, name=name),
        every("a page fault is an exit more than a divide error under VMX, and none more elsewhere",
              faults, lambda r: r["exits"] - row(r["technique"], r, "divzero")["exits"],
              lambda r: TIMES if r["technique"] in SHADOW else 0, name=name),
        every("of the first hundred writes to a table translated code traps for few, then none",
              writes, lambda r: (r["at first"], r["trace"], r["called out"]),
              lambda r: tuple(STORES[r["bits"]] * n for n in (
                  (TRAPS, 0, TIMES) if "bt" in r["technique"] else (TIMES + 1, TIMES, 0))),
              name=name),
        every("and once that is so, a write costs what was published",
              [row(SOFTWARE, r) for r in writes if r["bits"] == 64],
              lambda r: r["cycles"], lambda r: p.SOFTWARE["ptemod"], name=name),
        every("our translator pays one crossing more than theirs where a fault returns", returns,
              lambda r: r["cycles"] - p.SOFTWARE[r["operation"]], lambda r: p.BY_SOFTWARE["other"],
              name=name),
        every("a call and its return never cross: they are so many instructions longer, translated",
              table.where(operation="callret"), lambda r: r["beyond"],
              lambda r: BEYOND[r["bits"]] if "bt" in r["technique"] else 0, name=name),
        control("with the prices of hardware and software exchanged the order is the same",
                every("the order", software, lambda r: software_is_first(r, "exchanged"),
                      lambda r: r["operation"] in p.SOFTWARE_FIRST, name=name)),
        absent(every("with extended page tables no operation on memory exits", memory,
                     lambda r: r["exits"], lambda r: 0, name=name)),
    ]  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['operation']} under {row['technique']}, {row['bits']} bits"


def draw(table: Table, figure: "Figure") -> None:
    """Exits for one time."""
    from understudy.lab.figure import bars

    rows = table.where(bits=64)
    names = list(dict.fromkeys(row["operation"] for row in rows if row["operation"] != "cr8wr"))
    series = {
        technique: [table.where(technique=technique, operation=one, bits=64)[0]["exits"] / TIMES
                    for one in names]
        for technique in ("vmx, ept", HARDWARE, SOFTWARE, "pv")
    }  # fmt: skip
    bars(figure.add_subplot(), names, series, "exits for one time")


def exists(point: Row) -> bool:
    """CR8 is of 64-bit mode, and no paravirtual kernel's."""
    has_cr8 = point["bits"] == 64 and point["technique"] != "pv"
    return bool(has_cr8 or point["operation"] != "cr8wr")


EXPERIMENT = Experiment(
    measure=measure,
    guest="the teaching kernel, one operation a hundred times",
    sweep={"operation": list(OPERATIONS), "technique": list(TECHNIQUES), "bits": [64, 32]},
    quick={"bits": [64]},
    where=exists,
    columns=["operation", "technique", "bits", "instructions", "exits", "true", "trace",
             "called out", "other", "beyond", "at first", "cycles"],
    slide=49,
    check=check,
    draw=draw,
)  # fmt: skip
