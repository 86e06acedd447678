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
from typing import Any, Final, NamedTuple

from understudy.arch import paging_formats
from understudy.arch.address import is_canonical
from understudy.arch.paging_entry import address, words
from understudy.arch.paging_formats import EPT, Format, Level, descend
from understudy.vcpu.loop import Vcpu

Reader = Callable[[int, int], int | None]  # (address, bytes) to a value; None: no memory there
ABSENT: Final = {  # by whether it is the EPT, and what it leads to
    (True, "hpa"): "not mapped: EPT violation",
    (False, "hpa"): "no entry: an access is a hidden fault if the guest's tables allow it",
    (False, "gpa"): "not mapped: #PF, P=0 in its error code",
}
WIDE: Final = 100  # columns from which on the walks stand side by side


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


OWN: Final = "the guest's walk, which the processor does"
NONE: Final = Walk("the hypervisor has no tables", "", (), None, "the guest's name host frames")


class Registers(NamedTuple):
    """What decides how linear addresses translate."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptes: Sequence[int] | None  # of PAE paging; None: read where CR3 points


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


def inspect(
    gva: int, technique: str, guest: Registers, guest_memory: Reader,
    eptp: int, real: Registers, host_memory: Reader,
) -> Inspection:  # fmt: skip
    """Both walks of a linear address, as it would translate now.

    guest: the registers as the guest has them.  eptp: where the hypervisor's tables are; if that
    is 0, the processor translates by those that `real` names, the registers as they really are.
    """
    if not 0 <= gva < 1 << 64:
        raise ValueError(f"linear address {gva:#x}: expected 0 to {(1 << 64) - 1:#x}")
    theirs = linear("the guest's walk", guest, gva, guest_memory, "gpa")
    if eptp:
        ours = _ept(eptp, theirs.address, host_memory)
    else:
        ours = linear("the shadow's walk", real, gva, host_memory, "hpa")
    return Inspection(gva, technique, theirs, ours)


def of_vcpu(vcpu: Vcpu, gva: int) -> Inspection:
    """Both walks of an address of the guest that runs there."""
    vcpu.leave_guest()
    guest, memory, view = vcpu.guest, vcpu.memory, vcpu.view
    named, technique = view.tables_memory(memory), f"paging {view.paging.name}"
    if named is not memory:
        registers = Registers(*guest.control()[:4], None)
        walk = linear(OWN, registers, gva, reader(named.read), "gpa")
        if walk.address is not None:  # in the host's memory
            walk = walk._replace(end=walk.end.replace("gpa", "hpa", 1))
        return Inspection(gva, technique, walk, NONE)
    return inspect(
        gva, technique, Registers(*guest.control()), reader(memory.read),
        view.eptp, Registers(*guest.real_control()[:4], None), reader(memory.host.memory.read),
    )  # fmt: skip


def reader(read: Callable[[int, int], bytes]) -> Reader:
    """A memory's `read` as a walk wants it."""

    def word(at: int, size: int) -> int | None:
        try:
            return int.from_bytes(read(at, size), "little")
        except IndexError:
            return None

    return word


def linear(title: str, registers: Registers, gva: int, read: Reader, kind: str) -> Walk:
    """The walk of a linear address."""
    cr0, cr3, cr4, efer, pdptes = registers
    form = paging_formats.choose(cr0, cr4, efer)
    if form is None:
        gpa = gva & 0xFFFF_FFFF
        return Walk(f"{title}: paging is off", "CR0.PG=0", (), gpa, f"{kind} {gpa:#x}")
    title = f"{title}: {form.name}"
    if form.linear_bits <= 32:
        gva &= 0xFFFF_FFFF
    elif not is_canonical(gva, form.linear_bits):
        return Walk(title, "", (), None, "not canonical: #GP(0) or #SS(0), no walk")
    return _walk(title, f"CR3 {cr3:#x}", form, cr3 & form.root, gva, read, kind, pdptes)


def _ept(eptp: int, gpa: int | None, read: Reader) -> Walk:
    if gpa is None:
        return Walk("EPT", f"EPTP {eptp:#x}", (), None, "not reached: there is no gpa")
    title = f"EPT's walk of gpa {gpa:#x}"
    return _walk(title, f"EPTP {eptp:#x}", EPT, eptp & EPT.root, gpa, read, "hpa", None)


def _walk(
    title: str, named: str, form: Format, table: int, place: int, read: Reader, kind: str,
    pdptes: Sequence[int] | None,
) -> Walk:  # fmt: skip
    missing: list[int] = []

    def read_entry(at: int, size: int) -> int:
        raw = read(at, size)
        if raw is None:
            missing.append(at)
        return raw or 0

    levels, path = form.levels, [*_registers(form, read_entry, table, place, pdptes)]
    if not path or path[0][1] & form.present:
        table = path[0][1] & form.frame if path else table
        path += descend(form, form.lenient_rows, read_entry, table, place)[-1]
    if missing:
        steps = [_step(*row, place) for row in zip(levels, path[:-1], strict=False)]
        name = levels[len(steps)].name
        end = f"the {name} would lie at {missing[0]:#x}, where there is no memory"
        return Walk(title, named, tuple(steps), None, end)
    steps = [_step(*row, place) for row in zip(levels, path, strict=False)]
    entry, level = path[-1][1], levels[len(path) - 1]
    if not entry & form.present:
        steps[-1] = steps[-1]._replace(meaning="not present", words=())
        return Walk(title, named, tuple(steps), None, ABSENT[form is EPT, kind])
    inside = (1 << level.shift) - 1
    result = paging_formats.frame_of(entry, level.shift, form.entry_bytes) | place & inside
    end = f"{kind} {result:#x}: {_rights(form, steps)}"
    return Walk(title, named, tuple(steps), result, end)


def _registers(
    form: Format, read: paging_formats.ReadEntry, table: int, place: int,
    pdptes: Sequence[int] | None,
) -> list[tuple[int | None, int]]:  # fmt: skip
    """The entry that is a register under PAE paging; read in memory if nobody says what it is."""
    if not form.registers:
        return []
    index = place >> form.levels[0].shift
    if pdptes is not None:
        return [(None, pdptes[index])]
    at = table + index * form.entry_bytes
    return [(at, read(at, form.entry_bytes))]


def _step(level: Level, step: tuple[int | None, int], place: int) -> Step:
    """An entry in words."""
    at, raw = step
    is_page = level.table is None or (level.may_map and bool(raw & paging_formats.LARGE))
    layout = level.page if is_page else level.table
    assert layout is not None
    entry = layout(raw)
    what = f"maps a {_size(1 << level.shift)} page" if is_page else "names the table"
    index = place >> level.shift & (1 << level.bits) - 1
    said = f"{what} at {address(entry):#x}"
    return Step(level.name, index, at, raw, said, tuple(words(entry)))


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
