"""Memory follows who uses it: two machines in turn idle and busy, over time.

Claim: two machines with equal shares have together more memory than their host. With the tax
(tau 0.75) the one that uses all its memory has more of it than the one that is idle, and when they
change roles it is the other way round; what each is to have is, to a page, the fixed point of
rho = S / (P (f + k (1 - f))) for the sampled working sets, which is solved apart here. Without the
tax (tau 0) each keeps its half, whoever uses it.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Reclaiming
Idle Memory": the figure of a busy and an idle machine over time.

Control: without the tax the busy one has no more than its half.

Note: guests of a few instructions, which read their memory again and again: all of it or an eighth.
The periods are of 30 milliseconds, not of the paper's 30 seconds, and reading a page
takes 10 µs: a period is long beside both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from understudy.arch.address import PAGE
from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.lab.fixed_point import fixed_point
from understudy.linux import VM
from understudy.overcommit.plan import IdleTax
from understudy.overcommit.terms import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY = 16 << 20
RAM = "26M"
CODE, FIRST = 0x10_0000, 2 << 20
PART = 8  # an idle machine uses 1/PART
# mov rdi, rbx; next: mov al, [rdi]; add rdi, 4096; cmp rdi, rcx; jb next; jmp begin
TOUCH = bytes.fromhex("48 89 df 8a 07 48 81 c7 00 10 00 00 48 39 cf 72 f2 eb ed")
PERIOD_NS, PERIODS = 30_000_000, 24
FAR = 1  # page


def touching(host: Host, name: str) -> VM:
    """A machine with something in each page."""
    vm = host.vm(MEMORY, name=name)
    for gpa in range(FIRST, MEMORY, PAGE):
        vm.memory.write(gpa, (gpa | 1).to_bytes(8, "little"))
    vm.memory.write(CODE, TOUCH)
    write_gdt(vm.memory, CODE_64)
    vm.enter(long_mode(vm.memory, "touch", CODE, rbx=FIRST, rcx=MEMORY))
    return vm


def uses(vm: VM, is_busy: bool) -> None:
    """From now on it reads all its memory, or a part."""
    size = MEMORY - FIRST
    end = FIRST + (size if is_busy else size // PART)
    vm.vcpus[0].set_registers(vm.vcpus[0].registers() | {"rcx": end, "rdi": FIRST, "rip": CODE})


def measure(tau: str) -> dict[str, Any]:
    """Each period the working sets are sampled; in the middle the two change roles."""
    terms = Terms(is_always=True, plan=IdleTax(float(tau)), scan=0, looks_up=False, read_ns=10_000)
    row: dict[str, Any] = {"too_far": 0}
    with Host(pcpus=1, ram=RAM, overcommit=terms) as host:
        vms = [touching(host, name) for name in "ab"]
        stock = host.stock
        held = [stock.holdings[vm.memory.p2m] for vm in vms]
        for period in range(PERIODS):
            if period % (PERIODS // 2) == 0:
                for n, vm in enumerate(vms):
                    uses(vm, (period == 0) == (n == 0))
            for one in held:
                assert one.sampler is not None
                one.sampler.begin()
            host.run(deadline_ns=host.schedule.time.now() + PERIOD_NS)
            for one in held:
                assert one.sampler is not None
                one.sampler.end()
            stock.look()
            needs = held[0].need(), held[1].need()
            targets = [order.target for order in stock.orders]
            pages = sum(one.has for one in held) + host.frames.free_count - stock.shortage.wanted
            first = fixed_point(*needs, pages, tau)
            row["too_far"] += any(
                abs(target - expected) > FAR
                for target, expected in zip(targets, (first, pages - first), strict=True)
            )
            for one in held:
                row[f"{one.name}{period}"] = one.has
                row[f"active_{one.name}{period}"] = needs[held.index(one)].active
            assert all(vm.ended is None for vm in vms), [vm.ended for vm in vms]
        row["missed"] = stock.swap.read if stock.swap is not None else 0
        for vm in vms:
            vm.close()
    for name, period in (("first", PERIODS // 2 - 1), ("second", PERIODS - 1)):
        row |= {f"{name}_{key}": row[f"{key}{period}"] for key in "ab"}
    return row


def name(row: Row) -> str:
    """Which point it is."""
    return f"tau {row['tau']}"


def check(table: Table) -> list[Bar]:
    """Who has more, and when."""
    taxed, free = list(table.where(tau="0.75")), list(table.where(tau="0"))

    def told(rows: list[Row]) -> str:
        return "; ".join(
            f"{row['first_a']} and {row['first_b']}, then {row['second_a']} and {row['second_b']}"
            for row in rows
        )

    def follows(rows: Sequence[Row], words: str) -> Bar:
        holds = (
            all(r["first_a"] > 1.5 * r["first_b"] and r["second_b"] > 1.5 * r["second_a"]
                for r in rows)
            if rows else None
        )  # fmt: skip
        return true(f"with tau {words} the busy one has half as much again, in turn", holds,
                    told(list(rows)))  # fmt: skip

    return [
        follows(taxed, "0.75"),
        every("what each is to have is the fixed point, +-1 page, in each period", table,
              lambda r: r["too_far"], lambda r: 0, name=name),
        control("without the tax that is not so", follows(free, "0")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Pages that each has, and uses, over time."""
    rows = list(table)
    grid = figure.subplots(1, max(len(rows), 1), sharey=True, squeeze=False)[0]
    for axes, row in zip(grid, rows, strict=False):
        periods = range(PERIODS)
        for key, color in (("a", "C0"), ("b", "C1")):
            axes.plot(periods, [row[f"{key}{n}"] for n in periods], color=color, label=f"{key} has")
            axes.plot(periods, [row[f"active_{key}{n}"] for n in periods], ":", color=color,
                      label=f"{key} uses")  # fmt: skip
        axes.set(title=f"tau {row['tau']}", xlabel="periods")
    grid[0].set_ylabel("pages")
    grid[0].legend()


EXPERIMENT = Experiment(
    measure=measure,
    guest="two machines of 16 MBytes on a host of 26, one idle, one busy, then the other",
    sweep={"tau": ["0", "0.75"]},
    slide=37,
    check=check,
    draw=draw,
    columns=["tau", "first_a", "first_b", "second_a", "second_b", "too_far", "missed"],
)
