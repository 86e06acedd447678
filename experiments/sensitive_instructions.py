"""A kernel can run without privileges if each sensitive instruction traps; on IA-32 some do not.

Claim: for any conventional computer a virtual machine monitor may be constructed if the set of
sensitive instructions is a subset of the set of privileged ones. On IA-32 it is not: the difference
has names. With the processor's option that makes it empty, each has the effect it has in a virtual
machine, and the monitor is asked once for each.

Source: G. J. Popek and R. P. Goldberg, "Formal Requirements for Virtualizable Third Generation
Architectures", Communications of the ACM 17(7), 1974, Theorem 1; J. S. Robin and C. E. Irvine,
"Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor", USENIX
Security 2000; lecture, "Dealing with problematic ISAs".

Control: instructions that IA-32 keeps for level 0 trap on both and are right on both; NOP, which is
not sensitive, traps on neither.

Note: one instruction of a kernel at CPL 1, and what it leaves in memory, against the same in VMX
operation. The hypervisor's GDT is empty, so what loads a segment register (POP, MOV, far CALL, JMP,
RET, IRET) traps as it is; so does INT n, through its gates. With a GDT that holds the guest's
segments at DPL 1 they would not.
"""

from typing import TYPE_CHECKING, Any

from understudy.execution.deprivileged import Deprivileged
from understudy.guests.entry import CODE_32, CODE_64, Entry, long_mode, protected_mode, write_gdt
from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.lab.bare import CODE
from understudy.verdict import StopKind
from understudy.vm import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA, IDT, IDT_LIMIT = 0x12_0000, 0x11_0000, 0xFFF
STORED = 16
LDTR = {"ldtr": 0x28, "ldtr_limit": 7, "ldtr_attr": 0x82}
CPU = "understudy,-pmu,-xsaves"
ISAS = ("IA-32", "virtualizable")
END = "e6 f4"  # out 0F4h,al
TO_RDI = "48 89 07"  # mov [rdi],rax

SENSITIVE = {
    "sgdt": "0f 01 07", "sidt": "0f 01 0f", "sldt": "0f 00 07", "str": "0f 00 0f",
    "smsw": f"0f 01 e0 {TO_RDI}", "pushf": f"9c 58 {TO_RDI}",
    "popf": f"68 02 30 00 00 9d 9c 58 {TO_RDI}", "lar": f"b9 10 00 00 00 0f 02 c1 {TO_RDI}",
    "lsl": f"b9 10 00 00 00 0f 03 c1 {TO_RDI}", "verr": "b9 18 00 00 00 0f 00 e1 0f 94 07",
    "verw": "b9 18 00 00 00 0f 00 e9 0f 94 07", "mov r,cs": f"8c c8 {TO_RDI}",
    "mov m,ss": "8c 17",
}  # fmt: skip
"""64-bit code: the instruction, and what shows its effect at [RDI]."""
SENSITIVE_32 = {"push cs": "0e 8f 07", "push ss": "16 8f 07"}
PRIVILEGED = {
    "cli": f"fa 9c 58 {TO_RDI}", "mov r,cr0": f"0f 20 c0 {TO_RDI}",
    "mov r,cr4": f"0f 20 e0 {TO_RDI}",
    "rdmsr": f"b9 80 00 00 c0 0f 32 {TO_RDI}", "lgdt": "0f 01 07 0f 01 17 0f 01 07",
}  # fmt: skip
PLAIN = {"nop": "90 90"}
KINDS = {name: kind for kind, names in (
    ("sensitive", SENSITIVE), ("sensitive", SENSITIVE_32), ("privileged", PRIVILEGED),
    ("plain", PLAIN),
) for name in names}  # fmt: skip
CODES = SENSITIVE | SENSITIVE_32 | PRIVILEGED | PLAIN
OTHERS = {"popf": {"PUSHFQ"}, "cli": {"PUSHFQ"}, "lgdt": {"SGDT"}}
"""What else the program executes that is sensitive."""


def stored(vm: VM, name: str) -> bytes:
    """What the program leaves."""
    is_32 = name in SENSITIVE_32
    vm.memory.write(CODE, bytes.fromhex(f"{CODES[name]} {END}"))
    write_gdt(vm.memory, CODE_32 if is_32 else CODE_64)
    registers = {"rdi": DATA, "idtr_base": IDT, "idtr_limit": IDT_LIMIT} | LDTR
    if is_32:
        entry = protected_mode("bare", CODE, **registers)
    else:
        entry = long_mode(vm.memory, "bare", CODE, **registers)
    vm.enter(Entry(dict(entry.registers), "bare"))
    stop = vm.go(budget=100)
    if stop.kind != StopKind.DEBUG_EXIT:
        raise RuntimeError(f"{name}: the guest ended: {stop.kind} {stop.detail}")
    return vm.memory.read(DATA, STORED)


def measure(instruction: str, isa: str) -> dict[str, Any]:
    """Whether it trapped, and whether its effect was right."""
    with VM("16M", paging="lazy", cpu=CPU) as vm:
        expected = stored(vm, instruction)
    is_virtualizable = isa == "virtualizable"
    with VM(
        "16M", paging="lazy", cpu=CPU, execution="deprivileged", virtualizable_isa=is_virtualizable
    ) as vm:
        found = stored(vm, instruction)
        guest = vm.vcpus[0].guest
        assert isinstance(guest, Deprivileged)
        others = OTHERS.get(instruction, set()) | {"OUT"}
        traps = sum(often for name, often in guest.traps.items() if name not in others)
        slips = "" if guest.slips is None else "; ".join(
            words for words, _ in guest.slips.harmful.values()
        )  # fmt: skip
    return {
        "kind": KINDS[instruction], "traps": traps, "right": int(found == expected), "harm": slips,
    }  # fmt: skip


def check(table: Table) -> list[Bar]:
    """The two sets, and their difference."""
    sensitive = table.where(kind="sensitive")
    as_it_is = [row for row in sensitive if row["isa"] == "IA-32"]
    by_option = [row for row in sensitive if row["isa"] == "virtualizable"]
    privileged, plain = table.where(kind="privileged"), table.where(kind="plain")
    return [
        every("on IA-32 a sensitive instruction that is not privileged does not trap", as_it_is,
              lambda r: r["traps"], lambda r: 0, name=name),
        every("and its effect is not what it is in a virtual machine", as_it_is,
              lambda r: r["right"], lambda r: 0, name=name),
        every("with the option each traps once", by_option,
              lambda r: r["traps"], lambda r: 1, name=name),
        every("and its effect is right", by_option,
              lambda r: r["right"], lambda r: 1, name=name),
        every("privileged instructions trap on both, and are right but for others that they meet",
              privileged, lambda r: r["traps"], lambda r: 1, name=name),
        control("an instruction that is not sensitive traps",
                true("one traps", any(row["traps"] for row in plain), "none does")),
    ]  # fmt: skip


def name(row: Row) -> str:
    """What a row is about."""
    return f"{row['instruction']} on {row['isa']}"


def draw(table: Table, figure: "Figure") -> None:
    """Traps for each instruction."""
    from understudy.lab.figure import bars

    names = [row["instruction"] for row in table.where(isa=ISAS[0])]
    series = {
        isa: [table.where(isa=isa, instruction=one)[0]["traps"] for one in names] for isa in ISAS
    }
    bars(figure.add_subplot(), names, series, "traps for one execution")


EXPERIMENT = Experiment(
    measure=measure,
    guest="one instruction of a kernel",
    sweep={"instruction": list(CODES), "isa": list(ISAS)},
    columns=["instruction", "isa", "kind", "traps", "right", "harm"],
    slide=49,
    check=check,
    draw=draw,
)
