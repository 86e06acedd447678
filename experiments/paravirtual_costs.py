"""The same kernel native and paravirtual: what each of its operations costs in exits.

Claim: a changed kernel asks for more with fewer traps: a fork, a first touch of a page, another
root take no more exits than under any shadow paging, and what trap-and-emulate traps for one by
one, interrupts off and on or state of programs, takes none. It pays where hardware helps the
others: system calls go through the hypervisor.

Source: lecture, "Para-virtualization"; P. Barham et al., "Xen and the Art of Virtualization", SOSP
2003, section 3.3 and table 3.

Control: with extended page tables none of these operations exits.

Note: the two kernels are built of one source. What comes to the hypervisor is counted: VM exits in
VMX operation; deprivileged, traps of instructions and page faults; paravirtual, calls and page
faults, and beside them every crossing, system calls of programs as well. A paravirtual kernel
returns from events by a call, because no descriptor table of its own is in the processor: that is
why a system call costs one, the only row in which shadow paging takes fewer. (The pages that are
mapped and unmapped are not touched in between, so shadow paging does not hear of them.)
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.teaching import booted, counted
from understudy.linux import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TECHNIQUES = {
    "vmx, ept": ("vmx", "ept"), "vmx, eager": ("vmx", "eager"), "vmx, lazy": ("vmx", "lazy"),
    "vmx, vtlb": ("vmx", "vtlb"), "deprivileged, lazy": ("deprivileged", "lazy"),
    "pv": ("pv", "pv"),
}  # fmt: skip
SHADOW = ("vmx, eager", "vmx, lazy", "vmx, vtlb")
TIMES = {"fork": 10, "touch": 100, "call": 100, "irq": 100, "state": 100, "map": 100, "root": 100}
WORDS = {
    "fork": "fork, exit and wait", "touch": "first touch of a page", "call": "a system call",
    "irq": "interrupts off and on", "state": "four changes of a program's state",
    "map": "a page mapped and unmapped, of 100", "root": "another root loaded",
}  # fmt: skip
PV = {"fork": 7, "touch": 2, "call": 1, "irq": 0, "state": 0, "map": 0.02, "root": 1}
"""Exits of the paravirtual kernel: a hundred pages go in one batch, mapped and unmapped."""
TRAPS = {"irq": 3, "state": 6}
"""PUSHF, CLI, STI; two MOVs to debug registers, TLS, CR0 read and written, CLTS."""


def measure(technique: str, operation: str, bits: int) -> dict[str, Any]:
    """Exits for one time, of many; less what is around them."""
    execution, paging = TECHNIQUES[technique]
    times = TIMES[operation]
    with booted(execution, paging, bits) as vm:
        if operation == "touch":  # the page's table is there; the page is not
            counted(vm, operation, 1)
            few, many = _exits(vm, operation, 1), _exits(vm, operation, 1 + times)
        else:
            counted(vm, operation, times)
            few, many = _exits(vm, operation, 0), _exits(vm, operation, times)
    exits, crossings = (((b - a) / times) for a, b in zip(few, many, strict=True))
    return {"what": WORDS[operation], "exits": exits, "crossings": crossings}


def _exits(vm: VM, operation: str, times: int) -> tuple[int, int]:
    """What came to the hypervisor, and how often it had the processor, if that is counted."""
    found = counted(vm, operation, times)
    exits, own_counts = found["exits"], found.get("execution", {})
    if "traps" in own_counts:
        traps = sum(own_counts["traps"].values()) + exits.get("EXCEPTION_OR_NMI", 0)
        return traps, own_counts["crossings"]
    if "crossings" in own_counts:
        return sum(exits.values()), own_counts["crossings"]
    own = sum(number for reason, number in exits.items() if reason != "IO_INSTRUCTION")
    return own, own


def check(table: Table) -> list[Bar]:
    """Exact."""
    pv = table.where(technique="pv")

    def least(row: Row) -> float:
        others = [
            one["exits"] for one in table.where(operation=row["operation"], bits=row["bits"])
            if one["technique"] in SHADOW
        ]  # fmt: skip
        return float(min(others))

    fewer = [row for row in pv if row["operation"] in ("fork", "touch", "root")]
    none = [row for row in pv if row["operation"] in ("irq", "state")]
    trapped = [row for row in table.where(technique="deprivileged, lazy")
               if row["operation"] in ("irq", "state")]  # fmt: skip
    return [
        every("the paravirtual kernel's exits are these", pv,
              lambda r: r["exits"], lambda r: PV[r["operation"]], name=name),
        every("a fork, a first touch, another root: no more exits than the best of shadow paging",
              fewer, lambda r: min(r["exits"], least(r)), lambda r: r["exits"], name=name),
        every("interrupts and state of programs take it none",
              none, lambda r: r["exits"], lambda r: 0, name=name),
        every("and trap-and-emulate a trap for each instruction",
              trapped, lambda r: r["exits"], lambda r: TRAPS[r["operation"]], name=name),
        absent(every("with extended page tables none exits",
                     table.where(technique="vmx, ept"), lambda r: r["exits"], lambda r: 0,
                     name=name)),
    ]  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['operation']} under {row['technique']}, {row['bits']} bits"


def draw(table: Table, figure: "Figure") -> None:
    """Exits for a fork."""
    from understudy.lab.figure import bars

    rows = table.where(operation="fork", bits=64)
    names = [row["technique"] for row in rows]
    bars(figure.add_subplot(), names, {"fork": [row["exits"] for row in rows]}, "exits for a fork")


EXPERIMENT = Experiment(
    measure=measure,
    guest="the teaching kernel, native and paravirtual",
    sweep={"technique": list(TECHNIQUES), "operation": list(TIMES), "bits": [64, 32]},
    quick={"bits": [64]},
    columns=["what", "operation", "technique", "bits", "exits", "crossings"],
    slide=50,
    check=check,
    draw=draw,
)
