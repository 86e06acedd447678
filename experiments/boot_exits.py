"""Extended page tables take the memory management out of a boot's exits.

Claim: booting the same kernel, shadow paging takes several times the exits of extended page
tables; at least three quarters of them are for the memory's sake (page faults, INVLPG, control
registers). Under extended page tables there is no exit for a page fault, for INVLPG or for CR3.

Source: lecture, "ISA extensions: memory virtualization (continued), benefits of EPT"; two class
reports with exit counts of KVM guests booted with and without EPT, whose totals differ by factors
of 2.2 and 24.8.

Control: CPUID and I/O exits are the same under every technique, and so are the guest's
instructions, to the last one.

Note: KVM keeps the shadows of address spaces and synchronises them lazily, so the published band
is for the technique lazy. The kernels print nothing: the exits of a serial console would drown
all others.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, control, every, true
from understudy.lab.linux_checks import name, same
from understudy.lab.linux_session import KERNELS, session
from understudy.lab.techniques import SHADOW, techniques

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW, HIGH = 2.2, 24.8
MMU = ("EXCEPTION_OR_NMI", "INVLPG", "CR_ACCESS", "EPT_VIOLATION", "EPT_MISCONFIG")
GROUPS = {
    "page faults": ("EXCEPTION_OR_NMI",),
    "INVLPG": ("INVLPG", "INVPCID"),
    "control registers": ("CR_ACCESS",),
    "EPT violations": ("EPT_VIOLATION", "EPT_MISCONFIG"),
    "I/O": ("IO_INSTRUCTION",),
    "CPUID": ("CPUID",),
}


def select(values: Row) -> dict[str, Any]:
    """The boot's part of a session."""
    boot = values["boot"]
    exits = boot["exits"]
    grouped = {word: sum(exits.get(n, 0) for n in names) for word, names in GROUPS.items()}
    total = sum(exits.values())
    cr3 = sum(n for key, n in boot["cr_accesses"].items() if key.startswith("CR3"))
    return {
        "instructions": boot["instructions"],
        "exits": total,
        "mmu_exits": sum(exits.get(reason, 0) for reason in MMU),
        **{word.replace(" ", "_"): n for word, n in grouped.items()},
        "others": total - sum(grouped.values()),
        "cr3_exits": cr3,
        "hidden_faults": boot["faults"]["hidden"],
        "trace_faults": boot["faults"]["trace"],
        "boot_s": boot["wall_s"],
        "us_per_exit": boot["us_per_exit"],
    }


def check(table: Table) -> list[Bar]:
    """Zeros and identities exactly, the ratio within the published band."""
    shadows = table.where(paging=SHADOW)
    return [
        every("ept: no exit for a page fault, INVLPG or CR3", table.where(paging="ept"),
              lambda r: (r["page_faults"], r["INVLPG"], r["cr3_exits"]), lambda r: (0, 0, 0),
              name=name),
        every("without EPT: no EPT violation", shadows,
              lambda r: r["EPT_violations"], lambda r: 0, name=name),
        every("without EPT, at least 75 % of the exits are for the memory's sake", shadows,
              lambda r: r["mmu_exits"] * 4 >= r["exits"] * 3, lambda r: True, name=name),
        band("lazy takes 2.2 to 24.8 times the exits of ept", table, "lazy", "ept"),
        absent(same("CPUID exits are the same under every technique", table.rows, "CPUID")),
        absent(same("I/O exits are the same under every technique", table.rows, "I/O")),
        same("the guest executes the same instructions, to the last one", table.rows,
             "instructions"),
        control("ept against itself is not in the band", band("", table, "ept", "ept")),
    ]  # fmt: skip


def band(statement: str, table: Table, high: str, low: str) -> Bar:
    """For each kernel, the ratio of two techniques' exits."""
    ratios = {}
    for kernel in table.values("kernel"):
        a, b = (table.where(kernel=kernel, paging=paging) for paging in (high, low))
        if a and b:
            ratios[kernel] = a[0]["exits"] / b[0]["exits"]
    found = ", ".join(f"{kernel}: {ratio:.2f}" for kernel, ratio in ratios.items())
    if not ratios:
        return true(statement, None, "no pair of points was run")
    return true(statement, all(LOW <= ratio <= HIGH for ratio in ratios.values()), found)


def draw(table: Table, figure: "Figure") -> None:
    """A bar for each boot, made of its reasons."""
    from understudy.lab.figure import stacks

    def parts(row: Row) -> dict[str, float]:
        return {word: row[word.replace(" ", "_")] for word in GROUPS} | {"others": row["others"]}

    def panel(row: Row) -> str:
        return f"{row['kernel']} · {KERNELS[row['kernel']]}"

    rows = table.rows
    bars = [(panel(row), row["paging"], parts(row)) for row in rows]
    stacks(figure, [panel(row) for row in rows], bars, "exits of one boot")


EXPERIMENT = Experiment(
    measure=session,
    guest="unmodified Debian kernels with Debian's busybox, from the first instruction on",
    sweep={"kernel": list(KERNELS), "paging": techniques()},
    select=select,
    columns=[
        "kernel",
        "paging",
        "instructions",
        "exits",
        "page_faults",
        "INVLPG",
        "control_registers",
        "EPT_violations",
        "I/O",
        "CPUID",
        "boot_s",
        "us_per_exit",
    ],
    slide=65,
    check=check,
    draw=draw,
)
