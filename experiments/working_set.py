"""A few pages tell how much memory a guest uses.

Claim: of 100 pages chosen at random in each period, the part that is needed tells the part of the
guest's memory that is active within the binomial error, 3 sqrt(f (1 - f) / 100), in at least 99 %
of all periods, at a cost of 100 faults a period at the most.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server" (OSDI 2002), "Measuring Idle
Memory".

Control: pages chosen among the first of memory only, as no sampler should, miss the same bar.

Note: a guest of a few instructions touches the first part of its memory again and again; a page
table of its own covers all of it. Each paging technique, each from the same seed.
"""

from math import isqrt
from typing import TYPE_CHECKING, Any

from understudy.arch.address import PAGE
from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.linux import VM
from understudy.overcommit.working_set import SAMPLES, WorkingSet
from understudy.verdict import StopKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY = 16 << 20
PAGES = MEMORY // PAGE
CODE = 0x10_0000
# mov rdi, rbx; next: mov al, [rdi]; add rdi, 4096; cmp rdi, rcx; jb next; jmp begin
TOUCH = bytes.fromhex("48 89 df 8a 07 48 81 c7 00 10 00 00 48 39 cf 72 f2 eb ed")
ROUND = 2 * PAGES * 6  # instructions: more than a round through all of memory


class Narrow(WorkingSet):
    """One that looks at the beginning of memory only."""

    def begin(self) -> None:
        super().begin()
        self._give_back()
        self._pages //= 8
        for gfn in self._random.sample(range(self._pages), self._chosen):
            self._take(gfn)


def measure(active: int, paging: str, sampler: str, periods: int) -> dict[str, Any]:
    """`active`: per cent of memory that the guest touches in each period."""
    kind = {"random": WorkingSet, "narrow": Narrow}[sampler]
    with VM(MEMORY, paging=paging, name="toucher") as vm:
        vm.memory.write(CODE, TOUCH)
        write_gdt(vm.memory, CODE_64)
        end = PAGES * active // 100 * PAGE
        vm.enter(long_mode(vm.memory, "touch", CODE, rbx=0, rcx=end))
        sampled = kind(vm.memory)
        far = most = 0
        for _ in range(periods):
            before = sampled.faults
            sampled.begin()
            assert vm.go(budget=ROUND).kind is StopKind.BUDGET
            found = sampled.end()
            most = max(most, sampled.faults - before)
            f = end // PAGE
            error = 100 * found.touched * PAGES // SAMPLES - 100 * f  # in hundredths of a page
            far += abs(error) > 300 * isqrt(f * (PAGES - f) // SAMPLES + 1)
        estimate = sampled.active
        touched = sum(one.touched for one in sampled.periods)
        sampled.close()
    return {
        "far": far, "most_faults": most, "estimate": estimate, "pages": end // PAGE,
        "touched": touched, "faults": sampled.faults,
    }  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['paging']}, {row['active']} % active"


def check(table: Table) -> list[Bar]:
    """The binomial error, and the cost."""

    def within(sampler: str) -> Bar:
        rows = table.where(sampler=sampler)
        periods, far = sum(r["periods"] for r in rows), sum(r["far"] for r in rows)
        holds = 100 * far <= periods if rows else None
        words = f"{sampler}: in 99 % of periods the estimate is within the binomial error"
        return true(words, holds, f"{periods - far} of {periods}")

    first: dict[int, int] = {}
    for row in table.where(sampler="random"):
        first.setdefault(row["active"], row["touched"])
    return [
        within("random"),
        every(
            "100 faults a period at the most", table.where(sampler="random"),
            lambda r: r["most_faults"] <= SAMPLES, lambda r: True, name=name,
        ),
        every(
            "every technique finds the same, and it costs a fault for each page that was needed",
            table.where(sampler="random"),
            lambda r: (r["touched"], r["faults"]),
            lambda r: (first[r["active"]], r["touched"]),
            name=name,
        ),
        control("pages from the beginning only miss it", within("narrow")),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """What the sampler says over what the guest touches."""
    from understudy.lab.figure import lines, series

    rows = table.where(sampler="random")
    lines(figure.add_subplot(), series(rows, "paging", "pages", "estimate"), "active pages", "told")


EXPERIMENT = Experiment(
    measure=measure,
    guest="16 MBytes, of which a loop touches a part again and again",
    sweep={
        "active": [10, 30, 50, 80], "paging": ["ept", "vtlb", "lazy", "eager"],
        "sampler": ["random", "narrow"], "periods": [100],
    },
    quick={"active": [10, 50], "paging": ["ept", "vtlb"], "periods": [25]},
    where=lambda point: point["sampler"] == "random" or point["paging"] == "ept",
    slide=37,
    check=check,
    draw=draw,
)  # fmt: skip
