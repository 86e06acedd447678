"""A page walk in two dimensions takes (g+1)(h+1)-1 references.

Claim: with extended page tables, a TLB miss walks g levels of the guest's tables, and each of the
g+1 guest-physical addresses on the way takes a walk of h levels of its own: (g+1)(h+1)-1
references, 24 where both use pages of 4 KBytes. Large pages in either dimension shorten it. Shadow
page tables are walked in one dimension, as natively.

Source: lecture, "ISA extensions: memory virtualization (continued), downsides of EPT" (the walk is
O(N²)); R. Bhargava et al., "Accelerating Two-Dimensional Page Walks for Virtualized Systems",
ASPLOS 2008.

Control: a TLB hit takes no reference; two wrong numbers that circulate (25, which counts the
access itself, and 9 for 2M on 2M) must fail.

Note: PAE's four page-directory-pointer-table entries are registers, loaded with CR3, so its walk
has two levels; the load itself translates four guest-physical addresses and is counted apart.
Five levels, of the guest (`intel64-5`) or of the EPT (`4K/5`), are walked by the processor's walker
as an observer: no guest can turn them on here.
"""

from typing import TYPE_CHECKING, Any

from understudy.lab import Bar, Experiment, Row, Table, absent, control, equal, every
from understudy.lab.bare import CODE, FIVE, LAYOUTS, TURN_ON, Tables, assemble, entry, step_to
from understudy.lab.techniques import need
from understudy.vm import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = (
    ("90", "nop"),
    ("0f 22 df", "mov cr3,edi"),
    ("90", "nop"),
    ("8b 03", "mov eax,[ebx]"),
    ("8b 03", "mov eax,[ebx]"),
    ("90", "nop"),
    ("8b 03", "mov eax,[ebx]"),
)
PAGES = {"4K": 12, "2M": 21, "4M": 22, "1G": 30}
HOST_LEVELS = {"4K": 4, "2M": 3, "1G": 2, "4K/5": 5, "2M/5": 4, "1G/5": 3}
SHADOW = "shadow"  # instead of an EPT
RAM = {"4K": "16M", "2M": "16M", "1G": "1G", SHADOW: "16M"}
WALK_5, TABLE = 4 << 3, 0b111  # in an EPTP: four more levels below the root; in an entry: R, W, X
LMA_LME = 0x500
WINDOW = 1 << 30
MARK = 0x2A


def exists(point: Row) -> bool:
    """Which guest pages a format has; shadow page tables are for guests that run."""
    has_page = PAGES[point["page"]] in LAYOUTS[point["format"]].pages
    return has_page and (point["format"], point["host"]) != (FIVE, SHADOW)


def is_observed(row: Row) -> bool:
    """Whether a walk is only observed: it has five levels somewhere."""
    return row["format"] == FIVE or str(row["host"]).endswith("/5")


def guest_levels(row: Row) -> int:
    """Levels of the guest's walk that are read in memory."""
    layout = LAYOUTS[row["format"]]
    below = sum(1 for level in layout.form.levels if level.shift < PAGES[row["page"]])
    return layout.memory_levels - below


def formula(row: Row) -> int:
    """The number that is claimed."""
    return (guest_levels(row) + 1) * (HOST_LEVELS[row["host"]] + 1) - 1


def references(vm: VM) -> dict[str, int]:
    """References so far, by dimension."""
    walk = vm.counts()["walk"]
    return {dimension: sum(levels.values()) for dimension, levels in walk.items()}


def observe(format: str, page: str, host: str) -> dict[str, Any]:
    """Count the references of a walk that no guest here can make."""
    size, _, five = host.partition("/")
    with VM(RAM[size], paging=need("ept"), largest_page=size) as vm:
        tables = Tables(vm.memory, format)
        shift = PAGES[page]
        tables.map(WINDOW, 0 if shift > 12 else CODE, shift)
        eptp = vm.pages.eptp
        if five:
            root = vm.host.frame()
            vm.host.memory.write(root, ((eptp & -4096) | TABLE).to_bytes(8, "little"))
            eptp = root | eptp & 0xFC7 | WALK_5
        efer = LMA_LME if format in ("intel64", FIVE) else 0
        seen = vm.processors[0].walk(WINDOW, tables.root, tables.layout.cr4, efer, eptp)
    dimensions = [dimension for dimension, *_ in seen]
    return {
        "guest_references": dimensions.count("guest"),
        "host_references": dimensions.count("host"),
        "references": len(seen),
        "order": in_words(seen),
    }


def measure(format: str, page: str, host: str) -> dict[str, Any]:
    """Count one load that misses the TLB, between two instructions."""
    if is_observed({"format": format, "host": host}):
        return observe(format, page, host)
    paging = need("vtlb" if host == SHADOW else "ept")
    with VM(RAM[host], paging=paging, largest_page="2M" if host == SHADOW else host) as vm:
        tables = Tables(vm.memory, format)
        shift = PAGES[page]
        tables.map(WINDOW, 0 if shift > 12 else CODE + 0x8000, shift)
        data = CODE + 0x8000
        gva = WINDOW + (data if shift > 12 else 0)
        vm.memory.write(data, bytes([MARK]))
        vm.enter(entry(vm.memory, tables, PROGRAM, rbx=gva, rdi=tables.root))
        start = CODE if format == "intel64" else CODE + len(assemble(TURN_ON))
        step_to(vm, start + 1)
        loading = references(vm)
        if host != SHADOW:  # there the load of CR3 is carried out by the hypervisor
            step_to(vm, start + 4)
        loaded = references(vm)
        step_to(vm, start + 5)  # the page of the code is in the TLB again
        before = references(vm)
        step_to(vm, start + 7)
        after = first = references(vm)
        if vm.processors[0].gpr(0) != MARK:
            raise RuntimeError(f"the guest read {vm.processors[0].gpr(0):#x}, expected {MARK:#x}")
        step_to(vm, start + 9)
        hit = references(vm)
        order = walk_order(vm, gva)
        if host == SHADOW:  # the first load filled the shadow; a miss now walks it
            vm.processors[0].flush()
            step_to(vm, start + 10)
            before = references(vm)
            step_to(vm, start + 12)
            after = references(vm)
    return {
        "guest_references": after["guest"] - before["guest"],
        "host_references": after["host"] - before["host"],
        "references": sum(after.values()) - sum(before.values()),
        "on_hit": sum(hit.values()) - sum(first.values()),
        "order": order,
        "load_pdptes": sum(loaded.values()) - sum(loading.values()),
    }


def walk_order(vm: VM, gva: int) -> str:
    """The walk as the observer lists it: `h4 h3 h2 h1 g4 …`."""
    vm.vcpus[0].leave_guest()
    state = vm.vcpus[0].guest.registers()
    return in_words(
        vm.processors[0].walk(gva, state["cr3"], state["cr4"], state["efer"], vm.pages.eptp)
    )


def in_words(seen: list[tuple[str, int, int, int]]) -> str:
    """A walk's references in their order."""
    return " ".join(f"{dimension[0]}{level}" for dimension, level, _, _ in seen)


def expected_order(row: Row) -> str:
    """The host's walk to each table of the guest, that table's entry; last the page itself."""
    layout = LAYOUTS[row["format"]]
    top = layout.memory_levels
    first = 5 if row["host"].endswith("/5") else 4
    host = [f"h{level}" for level in range(first, first - HOST_LEVELS[row["host"]], -1)]
    out = []
    for level in range(top, top - guest_levels(row), -1):
        out += [*host, f"g{level}"]
    return " ".join(out + host)


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['format']} {row['page']} on {row['host']}"


def native(row: Row) -> int:
    """Levels of a native walk of the shadow: four for 64-bit guests, else two (PAE, or IA-32)."""
    return 4 if row["format"] == "intel64" else 2


def check(table: Table) -> "list[Bar]":
    """Exact, for every combination."""
    rows = table.where(host=tuple(HOST_LEVELS))
    loads = [row for row in rows if not is_observed(row)]
    shadows = table.where(host=SHADOW)
    by_name = {name(row): row["references"] for row in rows}
    known = {"intel64 4K on 4K": 24, "intel64 4K on 2M": 19, "intel64 2M on 2M": 15,
             "intel64 1G on 1G": 8, "ia32 4K on 4K": 14, "intel64-5 4K on 4K/5": 35}  # fmt: skip
    pinned = [
        {"n": key, "got": by_name[key], "want": known[key]} for key in known if key in by_name
    ]
    square = table.where(format="intel64", page="4K", host="4K")
    two = table.where(format="intel64", page="2M", host="2M")
    return [
        every("(g+1)(h+1)-1 references", rows, lambda r: r["references"], formula, name=name),
        every("g of them in the guest's tables", rows, lambda r: r["guest_references"],
              guest_levels, name=name),
        every("in the manual's order", rows, lambda r: r["order"], expected_order, name=name),
        every("the published numbers: 24, 19, 15, 8, 14, 35", pinned, lambda r: r["got"],
              lambda r: r["want"], name=lambda r: str(r["n"])),
        every("MOV to CR3 loads four entries under PAE, each through a walk of h; else none",
              loads, lambda r: r["load_pdptes"],
              lambda r: 4 * HOST_LEVELS[r["host"]] if r["format"] == "pae" else 0, name=name),
        every("on shadow page tables there is one dimension, at most as long as natively",
              shadows, lambda r: (r["host_references"], r["references"] <= native(r)),
              lambda r: (0, True), name=name),
        every("intel64 4K on shadow page tables: 4 references", shadows,
              lambda r: r["references"] if name(r) == "intel64 4K on shadow" else 4,
              lambda r: 4, name=name),
        absent(every("a TLB hit takes none", loads, lambda r: r["on_hit"], lambda r: 0, name=name)),
        *(control("counting the access itself (25) is refused",
                  equal("", row["references"], 25)) for row in square),
        *(control("9 for 2M on 2M is refused", equal("", row["references"], 9)) for row in two),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """A map: guest pages down, host pages across."""
    from understudy.lab.figure import heat

    rows = list(dict.fromkeys((row["format"], row["page"]) for row in table.rows))
    hosts = table.values("host")
    cells = [
        [
            next(iter(row["references"] for row in table.where(format=f, page=p, host=h)), None)
            for h in hosts
        ]
        for f, p in rows
    ]
    heat(
        figure,
        cells,
        [f"{f} · {p}" for f, p in rows],
        [h if h == SHADOW else f"EPT, {h}" for h in hosts],
        "references of one TLB miss",
    )


EXPERIMENT = Experiment(
    measure=measure,
    guest="a few instructions on page tables built by hand",
    sweep={
        "format": ["ia32", "pae", "intel64", FIVE],
        "page": ["4K", "2M", "4M", "1G"],
        "host": [*HOST_LEVELS, SHADOW],
    },
    where=exists,
    slide=64,
    check=check,
    draw=draw,
    columns=["format", "page", "host", "guest_references", "host_references", "references",
             "on_hit", "load_pdptes"],
)  # fmt: skip
