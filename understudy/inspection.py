"""What is behind a linear address of a guest: its own walk, and the hypervisor's beside it.

The guest's tables lead from the linear to a guest-physical address.  The hypervisor's lead on to
a host-physical one: under EPT from the guest-physical address, else (shadow paging) from the
linear address again, through the tables that the processor really uses.

Source: SDM 3A, "Paging"; SDM 3C, "The Extended Page Table Mechanism (EPT)".
Invariants: looking changes nothing, sets no accessed flag and is not counted; whatever the tables
contain, the result says so and nothing raises.
"""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.arch.bits import Bits
from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER
from understudy.arch.paging_entry import (
    PDE2M,
    PDE4M,
    PDE32,
    PDPTE1G,
    PTE,
    PTE32,
    EptPage,
    EptTable,
    PdpteRegister,
    Table,
    address,
    words,
)

if TYPE_CHECKING:
    from understudy.vm import VM

Reader = Callable[[int, int], int | None]  # (address, bytes) to a value; None: no memory there
LARGE: Final = 1 << 7
ABSENT: Final = {  # by whether it is the EPT, and what it leads to
    (True, "hpa"): "not mapped: EPT violation",
    (False, "hpa"): "no entry: an access is a hidden fault if the guest's tables allow it",
    (False, "gpa"): "not mapped: #PF, P=0 in its error code",
}
WIDE: Final = 100  # columns from which on the walks stand side by side


class Level(NamedTuple):
    """One level of a format: the entry's name, its index, its layouts."""

    name: str
    shift: int
    bits: int
    table: type[Bits] | None  # an entry that references a table
    page: type[Bits] | None  # one that maps a page


class Format(NamedTuple):
    """A paging mode, from the root down.  The names are the manual's."""

    name: str
    entry_bytes: int
    levels: tuple[Level, ...]
    is_present: int = 1  # any of these bits


IA32: Final = Format("32-bit paging", 4, (
    Level("PDE", 22, 10, PDE32, None), Level("PTE", 12, 10, None, PTE32)))  # fmt: skip
IA32_PSE: Final = Format("32-bit paging", 4, (
    Level("PDE", 22, 10, PDE32, PDE4M), Level("PTE", 12, 10, None, PTE32)))  # fmt: skip
PAE: Final = Format("PAE paging", 8, (
    Level("PDPTE", 30, 2, PdpteRegister, None), Level("PDE", 21, 9, Table, PDE2M),
    Level("PTE", 12, 9, None, PTE)))  # fmt: skip
LEVEL4: Final = Format("4-level paging", 8, (
    Level("PML4E", 39, 9, Table, None), Level("PDPTE", 30, 9, Table, PDPTE1G),
    Level("PDE", 21, 9, Table, PDE2M), Level("PTE", 12, 9, None, PTE)))  # fmt: skip
EPT: Final = Format("EPT", 8, (
    Level("PML4E", 39, 9, EptTable, None), Level("PDPTE", 30, 9, EptTable, EptPage),
    Level("PDE", 21, 9, EptTable, EptPage), Level("PTE", 12, 9, None, EptPage)), 7)  # fmt: skip


class Step(NamedTuple):
    """One entry on the way."""

    name: str
    number: int  # of the entry in its table
    at: int | None  # its address; None: it is a register
    entry: int
    meaning: str
    words: tuple[str, ...]


class Walk(NamedTuple):
    """A walk from its root to its end: an address, or the reason why there is none."""

    title: str
    root: str
    steps: tuple[Step, ...]
    address: int | None
    end: str

    def inspect(self) -> dict[str, Any]:
        """As nested plain values."""
        return self._asdict() | {
            "steps": [s._asdict() | {"words": list(s.words)} for s in self.steps]
        }


class Registers(NamedTuple):
    """What decides how linear addresses translate."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptes: Sequence[int] | None  # of PAE paging; None: read where CR3 points

    @property
    def format(self) -> Format | None:
        """None while paging is off."""
        if not self.cr0 & CR0.PG.mask:
            return None
        if self.efer & EFER.LMA.mask:
            return LEVEL4
        if self.cr4 & CR4.PAE.mask:
            return PAE
        return IA32_PSE if self.cr4 & CR4.PSE.mask else IA32


@dataclass(frozen=True, repr=False)
class Inspection:
    """Both walks of one linear address."""

    gva: int
    technique: str
    guest: Walk
    ours: Walk

    def inspect(self) -> dict[str, Any]:
        """As nested plain values."""
        return {
            "gva": self.gva, "technique": self.technique,
            "guest": self.guest.inspect(), "ours": self.ours.inspect(),
        }  # fmt: skip

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Inspection":
        """From what `inspect` gave."""
        walks = []
        for name in ("guest", "ours"):
            walk = dict(values[name])
            steps = tuple(Step(**s | {"words": tuple(s["words"])}) for s in walk.pop("steps"))
            walks.append(Walk(steps=steps, **walk))
        return cls(values["gva"], values["technique"], *walks)

    def text(self, columns: int) -> str:
        """For people: side by side if there is room, else one below the other."""
        head = f"linear address {self.gva:#x}, {self.technique}"
        if columns < WIDE:
            return "\n".join([head, "", *_column(self.guest, columns), "",
                              *_column(self.ours, columns)])  # fmt: skip
        width = (columns - 3) // 2
        left, right = _column(self.guest, width), _column(self.ours, width)
        rows = [f"{a:{width}} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
        return "\n".join([head, "", *rows])

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((120, 24)).columns)

    __repr__ = __str__


def inspect(vm: "VM", gva: int) -> Inspection:
    """Both walks of a linear address, as it would translate now."""
    if not 0 <= gva < 1 << 64:
        raise ValueError(f"linear address {gva:#x}: expected 0 to {(1 << 64) - 1:#x}")
    vcpu, memory = vm.vcpus[0], vm.host.memory
    vcpu.leave_guest()

    def guest_memory(gpa: int, size: int) -> int | None:
        hpa = vm.memory.hpa(gpa)
        return None if hpa is None else int.from_bytes(memory.read(hpa, size), "little")

    def host_memory(hpa: int, size: int) -> int | None:
        inside = hpa + size <= memory.size
        return int.from_bytes(memory.read(hpa, size), "little") if inside else None

    under_ept = vm.pages.eptp != 0
    registers = Registers(*vcpu.guest.control())
    guest = linear("the guest's walk", registers, gva, guest_memory, "gpa")
    if under_ept:
        ours = _ept(vm.pages.eptp, guest.address, host_memory)
    else:
        real = Registers(*vcpu.guest.real_control()[:4], None)
        ours = linear("the shadow's walk", real, gva, host_memory, "hpa")
    return Inspection(gva, f"paging {vm.pages.name}", guest, ours)


def linear(title: str, registers: Registers, gva: int, read: Reader, kind: str) -> Walk:
    """The walk of a linear address."""
    form = registers.format
    if form is None:
        gpa = gva & 0xFFFF_FFFF
        return Walk(f"{title}: paging is off", "CR0.PG=0", (), gpa, f"{kind} {gpa:#x}")
    title = f"{title}: {form.name}"
    if form is LEVEL4:
        top = gva >> 47
        if top not in (0, (1 << 17) - 1):
            return Walk(title, "", (), None, "not canonical: #GP(0) or #SS(0), no walk")
        root = registers.cr3 & 0x3FFF_FFFF_F000
    else:
        gva &= 0xFFFF_FFFF
        root = registers.cr3 & (0xFFFF_FFE0 if form is PAE else 0xFFFF_F000)
    named = f"CR3 {registers.cr3:#x}"
    return _walk(title, named, form, root, gva, read, kind, registers.pdptes)


def _ept(eptp: int, gpa: int | None, read: Reader) -> Walk:
    if gpa is None:
        return Walk("EPT", f"EPTP {eptp:#x}", (), None, "not reached: there is no gpa")
    root = eptp & 0x3FFF_FFFF_F000
    return _walk(
        f"EPT's walk of gpa {gpa:#x}", f"EPTP {eptp:#x}", EPT, root, gpa, read, "hpa", None
    )


def _walk(
    title: str, named: str, form: Format, table: int, place: int, read: Reader, kind: str,
    pdptes: Sequence[int] | None,
) -> Walk:  # fmt: skip
    steps: list[Step] = []

    def ended(result: int | None, end: str) -> Walk:
        return Walk(title, named, tuple(steps), result, end)

    for level in form.levels:
        index = place >> level.shift & (1 << level.bits) - 1
        at: int | None = table + index * form.entry_bytes
        raw = read(table + index * form.entry_bytes, form.entry_bytes)
        if level.table is PdpteRegister and pdptes is not None:
            at, raw = None, pdptes[index]
        if raw is None:
            return ended(None, f"the {level.name} would lie at {at:#x}, where there is no memory")
        if not raw & form.is_present:
            steps.append(Step(level.name, index, at, raw, "not present", ()))
            return ended(None, ABSENT[form is EPT, kind])
        is_page = level.table is None or (level.page is not None and bool(raw & LARGE))
        layout = level.page if is_page else level.table
        assert layout is not None
        entry = layout(raw)
        table = address(entry)
        size = _size(1 << level.shift)
        meaning = (
            f"maps a {size} page at {table:#x}" if is_page else f"names the table at {table:#x}"
        )
        steps.append(Step(level.name, index, at, raw, meaning, tuple(words(entry))))
        if is_page:
            offset = (1 << level.shift) - 1
            result = table & ~offset | place & offset
            return ended(result, f"{kind} {result:#x}: {_rights(form, steps)}")
    raise AssertionError("the last level maps a page")


def _rights(form: Format, steps: Sequence[Step]) -> str:
    """What all the levels together allow, as far as they say."""

    def everywhere(word: str, missing: str) -> bool:
        return any(word in s.words for s in steps) and not any(missing in s.words for s in steps)

    if form is EPT:
        kinds = [k for k in ("read", "write", "execute")
                 if everywhere(f"{k} access", f"no {k} access")]  # fmt: skip
        return ", ".join(kinds)
    out = ["user" if everywhere("user", "supervisor") else "supervisor"]
    out.append("read/write" if everywhere("read/write", "read-only") else "read-only")
    if any("execute-disable" in s.words for s in steps):
        out.append("execute-disable")
    return ", ".join(out)


def _size(length: int) -> str:
    for unit, name in ((1 << 30, "GByte"), (1 << 20, "MByte"), (1 << 10, "KByte")):
        if length >= unit:
            return f"{length // unit}-{name}"
    return f"{length}-byte"


def _column(walk: Walk, width: int) -> list[str]:
    """A walk as lines."""
    lines = [walk.title] + ([walk.root] if walk.root else [])
    for step in walk.steps:
        where = "a register" if step.at is None else f"at {step.at:#x}"
        text = [f"{step.name}[{step.number}] {where}: {step.entry:#x}", f"    {step.meaning}"]
        if step.words:
            text.append(f"    {', '.join(step.words)}")
        lines += text
    lines.append(walk.end)
    out: list[str] = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())] + "    "
        out += textwrap.wrap(line, width, subsequent_indent=indent) or [""]
    return out
