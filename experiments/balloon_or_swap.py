"""A guest that gives memory by its balloon works on; one whose host swaps waits for its pages.

Claim: a guest uses a part of its memory again and again, and its host wants a quarter of the memory
back. If the balloon takes what the guest does not use, the guest retires as many instructions in
the same virtual time, with as many exits, as in a machine that is smaller by so much, and misses
nothing. If the host swaps out frames at random, the guest misses some, each of which is an exit and
a wait, and does less.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Ballooning":
a ballooned machine does nearly as much as one configured so; "Page Replacement".

Control: a host that wants nothing back reads nothing, and its guest does as much as the smaller
one.

Note: the guest is a loop of a few instructions that reads a word of each page. A page that is read
from the swap file takes 100 µs of virtual time.
"""

from typing import TYPE_CHECKING, Any, Final

from understudy.arch.address import PAGE
from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every, true
from understudy.overcommit.terms import Terms
from understudy.sched.seat import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY: Final = 16 << 20
WANTED: Final = MEMORY // 4
CODE: Final = 0x10_0000
FIRST, USED = 2 << 20, 8 << 20
# mov rdi, rbx; next: mov al, [rdi]; add rdi, 4096; cmp rdi, rcx; jb next; jmp begin
TOUCH: Final = bytes.fromhex("48 89 df 8a 07 48 81 c7 00 10 00 00 48 39 cf 72 f2 eb ed")
PERIOD_NS, PERIODS = 1_000_000, 400
NOTHING, BALLOON, SMALLER, SWAP = "nothing", "balloon", "a smaller machine", "swap"


def measure(means: str, paging: str) -> dict[str, Any]:
    """Let virtual time pass, while the host has no more frames for the guest than it wants."""
    size = MEMORY - WANTED if means == SMALLER else MEMORY
    most = (MEMORY if means == NOTHING else MEMORY - WANTED) // PAGE
    terms = Terms(is_always=True, scan=0, looks_up=False, swap=MEMORY)
    with Host(pcpus=1, ram="64M", overcommit=terms) as host:
        vm = host.vm(size, paging=paging, name="guest")
        for gpa in range(FIRST, size, PAGE):
            vm.memory.write(gpa, (gpa | 1).to_bytes(8, "little"))
        vm.memory.write(CODE, TOUCH)
        write_gdt(vm.memory, CODE_64)
        vm.enter(long_mode(vm.memory, "touch", CODE, rbx=FIRST, rcx=FIRST + USED))
        holding, swap = host.stock.holdings[vm.memory.p2m], host.stock.swap
        assert swap is not None
        if means == BALLOON:
            holding.ballooned.inflate([((MEMORY - WANTED) // PAGE, WANTED // PAGE)])
        for period in range(PERIODS):
            if means == SWAP and holding.has > most:
                swap.reclaim(vm.memory.p2m, holding.has - most)
            host.run(deadline_ns=(period + 1) * PERIOD_NS)
        host.schedule.settle()
        counts = vm.counts()
        row = {
            "instructions": vm.instructions, "exits": sum(counts["exits"].values()),
            "missed": swap.read, "written": swap.written,
            "waited_us": vm.claim.seats[0].counts.ns[State.BLOCKED] // 1000,
            "ended": str(vm.ended),
        }  # fmt: skip
        vm.close()
    return row


def name(row: Row) -> str:
    """Which point it is."""
    return f"{row['paging']}, {row['means']}"


def check(table: Table) -> list[Bar]:
    """What the guest does, and what it costs."""
    by = {(row["paging"], row["means"]): row for row in table}

    def like(row: Row) -> tuple[Any, Any]:
        other = by.get((row["paging"], SMALLER), {})
        return other.get("instructions"), other.get("exits")

    def work(row: Row) -> tuple[Any, Any]:
        return row["instructions"], row["exits"]

    swapped = [row for row in table if row["means"] == SWAP]
    pairs = [(row["instructions"], like(row)[0]) for row in swapped if like(row)[0]]
    told = ", ".join(f"{100 * done // whole} %" for done, whole in pairs)
    ept = [row for row in swapped if row["paging"] == "ept" and like(row)[1] is not None]
    return [
        every("with a balloon it does as much as in a smaller machine, with as many exits",
              table.where(means=BALLOON), work, like, name=name),
        every("and misses nothing", table.where(means=BALLOON),
              lambda r: (r["missed"], r["waited_us"]), lambda r: (0, 0), name=name),
        true("if the host swaps it does less",
             all(done < whole for done, whole in pairs) if pairs else None, told),
        every("each page that is missed is a wait of 100 µs at least", swapped,
              lambda r: r["waited_us"] >= 100 * (r["missed"] - 1) > 0, lambda r: True, name=name),
        every("and, under EPT, one exit; of others it has no more than the smaller one", ept,
              lambda r: 0 <= r["exits"] - r["missed"] <= like(r)[1], lambda r: True, name=name),
        every("every machine goes on", table, lambda r: r["ended"], lambda r: "None", name=name),
        absent(every("whose host wants nothing does as much as the smaller one",
                     table.where(means=NOTHING), work, like, name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Instructions in the same virtual time."""
    from understudy.lab.figure import bars

    kinds = list(dict.fromkeys(row["means"] for row in table))
    series = {
        paging: [row["instructions"] for row in table if row["paging"] == paging]
        for paging in dict.fromkeys(row["paging"] for row in table)
    }
    bars(figure.add_subplot(), kinds, series, "instructions in the same time")


EXPERIMENT = Experiment(
    measure=measure,
    guest="16 MBytes, of which a loop reads 8 again and again",
    sweep={"means": [NOTHING, BALLOON, SMALLER, SWAP], "paging": ["ept", "vtlb", "lazy", "eager"]},
    quick={"paging": ["ept", "vtlb"]},
    slide=37,
    check=check,
    draw=draw,
    columns=["paging", "means", "instructions", "exits", "missed", "written", "waited_us"],
)
