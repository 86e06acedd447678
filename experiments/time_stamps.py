"""RDTSC in three ways: trapped and emulated, offset by the processor, translated.

Claim: a time stamp that is the hypervisor's to say costs a trap where it is emulated, nothing where
the processor adds an offset, and a dozen instructions where the kernel's code is translated; a
paravirtual kernel adds the offset itself, or calls for the time.

Source: K. Adams and O. Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization", ASPLOS 2006 (2030 cycles by a trap, 216 by code in the translation cache; from
memory); SDM 3C, "RDTSC exiting" and "Use TSC offsetting".

Control: the guest executes equally many instructions of its own in each way; a call and its return,
which are translated too, take no trap in any.

Note: for one RDTSC of a kernel. `beyond` is what the processor executes beyond the guest's own
instructions: one less where the hypervisor carries the instruction out; in translation, less what a
call and its return around it add.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.teaching import between, beyond, booted, counted, executed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "offset in the VMCS": ("vmx", "ept", "", ()),
    "exit": ("vmx", "ept", "", ("rdtsc",)),
    "trap": ("deprivileged", "lazy", "", ()),
    "translated": ("bt", "lazy", "", ()),
    "offset in a shared page": ("pv", "pv", "", ()),
    "call": ("pv", "pv", "no-clock", ()),
}
TIMES = 100
NATIVE = ("offset in the VMCS", "exit", "trap", "translated")
COMES = ("exit", "trap", "call")
TRANSLATED = 12
"""Instructions more, as docs/techniques/bt.md has it."""


def measure(way: str, bits: int) -> dict[str, Any]:
    """How often it comes to the hypervisor, and what is executed beyond the guest's code."""
    execution, paging, append, exits = WAYS[way]
    with booted(execution, paging, bits, append, exits=exits) as vm:
        counted(vm, "rdtsc", TIMES)
        counted(vm, "callret", TIMES)
        comes = sum(between(vm, "rdtsc", 0, TIMES).values()) / TIMES
        calls = sum(between(vm, "callret", 0, TIMES).values()) / TIMES
        guest, processor = executed(vm, "rdtsc")
        around = beyond(vm, "callret")
    return {
        "comes": comes, "calls": calls, "executes": guest, "beyond": processor - guest - around,
    }  # fmt: skip


def check(table: Table) -> list[Bar]:
    """Exact."""

    def of_offset(r: Row) -> Row:
        return table.where(way="offset in the VMCS", bits=r["bits"])[0]

    return [
        every("it comes to the hypervisor once, or not at all", table,
              lambda r: r["comes"], lambda r: int(r["way"] in COMES), name=name),
        every("the processor executes so many instructions beyond the guest's", table,
              lambda r: r["beyond"],
              lambda r: TRANSLATED if r["way"] == "translated" else -int(r["way"] in COMES),
              name=name),
        every("the native kernel executes equally many of its own in each way",
              table.where(way=NATIVE), lambda r: r["executes"],
              lambda r: of_offset(r)["executes"], name=name),
        absent(every("a call and its return never come to the hypervisor", table,
                     lambda r: r["calls"], lambda r: 0, name=name)),
    ]  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['way']}, {row['bits']} bits"


def draw(table: Table, figure: "Figure") -> None:
    """Instructions beyond the guest's."""
    from understudy.lab.figure import bars

    rows = table.where(bits=64)
    names = [row["way"] for row in rows]
    series = {
        "times in the hypervisor": [row["comes"] for row in rows],
        "further instructions": [max(row["beyond"], 0) for row in rows],
    }
    bars(figure.add_subplot(), names, series, "for one RDTSC")


EXPERIMENT = Experiment(
    measure=measure,
    guest="the teaching kernel, which reads its clock",
    sweep={"way": list(WAYS), "bits": [64, 32]},
    quick={"bits": [64]},
    columns=["way", "bits", "comes", "executes", "beyond"],
    slide=49,
    check=check,
    draw=draw,
)
