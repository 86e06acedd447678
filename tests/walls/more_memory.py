"""More Debians than there is memory: each computes checksums of its own files, all the time.

    python -m tests.walls.more_memory [--vms 8] [--memory 256M] [--ram 1G] [--minutes 10]
                                      [--paging ept] [--then vtlb] [--files 10] [--balloon]
                                      [--clock wall] [--copies]

What: each VM makes files of its own (some numbers, again and again, so that no two pages of memory
are alike: the length of what is repeated is odd) in memory, in all more than the host has,
and computes their checksums again and again, while the host shares, balloons and swaps; in the
middle the paging technique may become another one.
Source: none.
Invariants: every checksum is the one that is computed here; no VM ends; the process never has more
than the frames that are taken and what it may have beside, measured from outside; all counts add up
to the frames there are; pages are swapped out and come back while checksums are computed.  It ends
with status 1 if one of these is not so.
"""

import argparse
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from tests.walls.asking import SECOND, ask, ask_all, run_until, until_booted
from tests.walls.outside import CODE, HOST, OWN, Limit
from understudy.host import Host
from understudy.linux import VM
from understudy.overcommit.accounts import Kind, accounts
from understudy.quantities import bytes_of

STEP_S: Final = 5
FILES: Final = 10
PIECE: Final = 99_999  # bytes that are repeated
TIMES: Final = 130  # in a file: 13 MBytes
FIRST: Final = 100_000_000
PRESSURE: Final = 4096  # pages that have to come back from the swap file, to count as pressure
PLACE: Final = "mkdir /files && mount -t tmpfs -o size=90% files /files"
"""The root file system may be half of memory at most, and that all of them fit in."""


@dataclass
class Report:
    """What was seen."""

    rounds: Counter[VM] = field(default_factory=Counter)  # of each, through its files
    longest: int = 0  # ns of host time, of a round
    outside: Counter[str] = field(default_factory=Counter)  # bytes, at most, by kind
    written: int = 0  # pages, ever, as the next ones
    read: int = 0
    copied: int = 0
    out: int = 0  # pages, at most, as the next ones
    shared: int = 0
    ballooned: int = 0
    last: str = ""

    def row(self) -> str:
        """All of it, as a row of the table in docs/results/overcommit.md."""
        rounds = self.rounds.values()
        cells = (
            f"{sum(rounds)}", f"{min(rounds, default=0)}", f"{self.longest / SECOND:.1f}",
            f"{self.written}", f"{self.read}", f"{self.out}", f"{self.shared}", f"{self.copied}",
            f"{self.ballooned}", *(f"{self.outside[kind] / 1e6:.0f}" for kind in (HOST, CODE, OWN)),
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


COLUMNS: Final = (
    "| rounds | of the slowest VM | longest, s | swapped out, ever | in, ever | out, at most | "
    "saved by sharing, at most | copied | ballooned, at most | resident, MBytes | translated | "
    "beside |"
)


class MoreMemory:
    """A host of two pCPUs."""

    def __init__(
        self, host: Host, count: int, memory: str, files: int = FILES, times: int = TIMES,
        *, copies: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Boot so many, with so many files each.  `copies`: only the first one is booted."""
        self.host, self.files, self.times, self.report = host, files, times, Report()
        self.limit = Limit(host)
        self.vms = [
            host.linux("cloud-amd64", memory=memory, name=f"vm{number}", **options)
            for number in range(1 if copies else count)
        ]
        until_booted(host, self.vms)
        if copies:
            saved = self.vms.pop().save()
            host.vms[0].close()
            self.vms = [VM.restore(saved, host=host) for _ in range(count)]
            until_booted(host, self.vms)
        self.wrong: list[str] = []
        self.sums: dict[VM, str] = {}
        makes: dict[VM, str] = {}
        for number, vm in enumerate(self.vms):
            self.sums[vm] = "".join(self._sum(number * files + n) + "\n" for n in range(files))
            makes[vm] = " && ".join(
                [PLACE, *(self._make(number * files + n, f"/files/{n}") for n in range(files))]
            )
        ask_all(host, makes)

    def _make(self, number: int, path: str) -> str:
        """Commands that write a file."""
        first, times = FIRST + number * PIECE, range(self.times)
        piece = f"seq {first} {first + PIECE // 10} | head -c {PIECE} > /piece"
        return f"{piece} && cat {' '.join('/piece' for _ in times)} > {path}"

    def _sum(self, number: int) -> str:
        """The checksum of that file, computed here."""
        first = FIRST + number * PIECE
        text = "".join(f"{n}\n" for n in range(first, first + PIECE // 10 + 1))
        piece = text.encode()[:PIECE]
        assert len(piece) == PIECE
        return hashlib.md5(piece * self.times, usedforsecurity=False).hexdigest()

    def _begin(self, vm: VM) -> None:
        """One round, and the next when it is over."""
        began = self.host.schedule.time.now()

        def ended(heard: str, status: int) -> None:
            if status or heard != self.sums[vm]:
                self.wrong.append(f"{vm.name}: {heard!r}, expected {self.sums[vm]!r}")
            report = self.report
            report.rounds[vm] += 1
            report.longest = max(report.longest, self.host.schedule.time.now() - began)
            if self._goes_on:
                self._begin(vm)

        names = " ".join(f"/files/{n}" for n in range(self.files))
        ask(vm, f"md5sum {names} | cut -d' ' -f1", ended)

    def work(self, seconds: float, step_s: float = STEP_S) -> None:
        """All compute for so much host time, and no checksum is wrong."""
        self._goes_on = True
        for vm in self.vms:
            self._begin(vm)
        end = self.host.schedule.time.now() + int(seconds * SECOND)
        while (now := self.host.schedule.time.now()) < end:
            self.host.run(deadline_ns=min(now + int(step_s * SECOND), end))
            self.look()
        self._goes_on = False
        rounds = {vm: self.report.rounds[vm] + 1 for vm in self.vms}
        run_until(self.host, lambda: all(self.report.rounds[vm] >= rounds[vm] for vm in rounds))
        self.look()

    def change(self, paging: str) -> None:
        """Another technique, for all of them, while they run."""
        for vm in self.vms:
            vm.paging = paging

    def look(self) -> None:
        """Whether all is as it should be."""
        assert not self.wrong, self.wrong
        assert all(vm.ended is None for vm in self.vms), [vm.ended for vm in self.vms]
        told, stock = accounts(self.host.stock), self.host.stock
        assert stock.swap is not None
        for account in told.vms:
            assert sum(account.kinds.values()) == account.size
        assert told.own + told.free + sum(vm.consumed for vm in told.vms) == told.total
        own = sum(vm.memory.spare.count + vm.pages.reserve.count for vm in self.vms)
        assert own <= told.own <= own + 64, (told.own, own)
        self.limit.look()
        report, swap = self.report, stock.swap
        report.outside = self.limit.most
        report.written, report.read, report.copied = swap.written, swap.read, self.host.copied
        report.out = max(report.out, swap.swapped)
        report.shared = max(report.shared, sum(vm.saved for vm in told.vms))
        report.ballooned = max(report.ballooned, sum(vm.kinds[Kind.BALLOONED] for vm in told.vms))
        report.last = (
            f"{stock.why}; {swap.in_file} pages in the file, {swap.alike} of {swap.looked_up} "
            "victims shared"
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.walls.more_memory")
    parser.add_argument("--vms", type=int, default=8)
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--ram", default="1G")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--paging", default="ept")
    parser.add_argument("--then", default="")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--clock", choices=("wall", "virtual"), default="wall")
    parser.add_argument("--pressure", type=int, default=PRESSURE)
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--balloon", action="store_true")
    options = parser.parse_args()
    with Host(pcpus=2, ram=options.ram, clock=options.clock) as host:
        began = time.monotonic()
        tables = max(bytes_of(options.memory) // 16, 8 << 20)
        many = MoreMemory(
            host, options.vms, options.memory, options.files, options.times, paging=options.paging,
            copies=options.copies, table_memory=tables, balloon=options.balloon,
        )  # fmt: skip
        print(f"booted and filled after {time.monotonic() - began:.0f} s", flush=True)
        assert host.stock.swap is not None
        print(COLUMNS)
        for half in range(2):
            before = host.stock.swap.read
            many.work(options.minutes * 30)
            print(many.report.row(), flush=True)
            print(f"{time.monotonic() - began:.0f} s; {many.report.last}", flush=True)
            assert host.stock.swap.read - before >= options.pressure, "it fits: nothing was shown"
            if not half and options.then:
                many.change(options.then)


if __name__ == "__main__":
    main()
