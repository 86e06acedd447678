"""As many Debians as possible in little memory: what each of them costs.

    python -m tests.walls.two_hundred [--vms 200] [--forked 20] [--memory 128M] [--ram 22G]
                                      [--megabytes 8] [--at-once 8] [--swap 0]

What: so many are booted, each for itself, on a host that shares their pages; some are forked from
the first one.  Each writes so many MBytes that nobody else has; then all are looked at for as long
as the host needs to have scanned each page twice; and each answers a command and finds what it has
written.
Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory".
Invariants: every answer is right, no VM ends, all counts add up to the frames there are; the
process never has more than the frames that are taken and what it may have beside, measured from
outside.  It ends with status 1 if one of these is not so.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from tests.walls.asking import SECOND, ask_all, run_until, until_booted
from tests.walls.outside import CODE, OWN, Limit
from understudy.host import Host
from understudy.linux import VM
from understudy.overcommit.accounts import Accounts, accounts
from understudy.overcommit.terms import Terms

PAGE: Final = 4096
ROUNDS: Final = 2
WRITE: Final = "head -c {bytes} /dev/urandom > /mine; sha256sum /mine > /sum; sync"
ANSWER: Final = "sha256sum -c /sum; echo $(({number} + 1))"


@dataclass
class Cost:
    """What was seen at the end, in bytes where nothing else is said."""

    booted: int
    forked: int
    told: Accounts
    scans: int  # pages that were looked at
    resident: int  # of the host's memory, from outside
    process: int  # beside it: of the process's own, at most, since before the first VM
    translated: int  # beside both, at most, for all VMs together
    seconds: float

    def kinds(self, first: int, end: int) -> Counter[str]:
        """Pages of these VMs, kind by kind."""
        found: Counter[str] = Counter()
        for vm in self.told.vms[first:end]:
            found.update({str(kind): count for kind, count in vm.kinds.items()})
            found.update(size=vm.size, consumed=vm.consumed, saved=vm.saved)
        return found

    def __str__(self) -> str:
        """A table, in MBytes for each VM."""
        count = self.booted + self.forked
        booted, forked = self.kinds(0, self.booted), self.kinds(self.booted, count)
        lines = ["| of each, MBytes | booted | forked |", "|---|---|---|"]
        for name in booted:
            one = booted[name] * PAGE / self.booted / 1e6
            other = f"{forked[name] * PAGE / self.forked / 1e6:.2f}" if self.forked else ""
            lines.append(f"| {name} | {one:.2f} | {other} |")
        own = self.told.own * PAGE / count / 1e6
        lines.append(f"| the hypervisor's frames | {own:.2f} | {own:.2f} |")
        beside = self.process / count / 1e6
        lines.append(f"| the hypervisor's process | {beside:.2f} | {beside:.2f} |")
        return "\n".join(lines) + (
            f"\n\n{self.booted} booted and {self.forked} forked: {self.resident / 1e6:.0f} MBytes "
            f"of the host's memory, {self.process / 1e6:.0f} of the process and "
            f"{self.translated / 1e6:.0f} translated, after "
            f"{self.seconds:.0f} s; {self.scans} pages scanned; {self.told.why}"
        )


def crowd(
    count: int, forked: int, memory: str = "128M", ram: str = "22G", megabytes: int = 8,
    at_once: int = 8, swap: str | None = None, tell: bool = False,
) -> Cost:  # fmt: skip
    """Boot, fork, write, share, ask.  AssertionError if anything is not as it should be."""
    began, scan = time.monotonic(), 100_000
    with Host(pcpus=2, ram=ram, overcommit=Terms(is_always=True, scan=scan, swap=swap)) as host:
        limit = Limit(host)

        def step(what: str) -> None:
            limit.look()
            if tell:
                free = host.frames.free_count * PAGE >> 20
                print(f"{time.monotonic() - began:.0f} s: {what}; {free} MBytes free", flush=True)

        vms: list[VM] = []
        for first in range(0, count, at_once):
            some = [
                host.linux("cloud-amd64", memory=memory, name=f"vm{number}", balloon=True)
                for number in range(first, min(first + at_once, count))
            ]
            until_booted(host, some)
            vms += some
            step(f"{len(vms)} booted")
        if forked:
            with vms[0].snapshot() as image:
                vms += image.fork(forked)
            step(f"{forked} forked")
        write = WRITE.format(bytes=megabytes << 20)
        for first in range(0, len(vms), at_once):
            ask_all(host, dict.fromkeys(vms[first : first + at_once], write))
        step(f"each has written {megabytes} MBytes")
        sharing = host.stock.sharing
        assert sharing is not None
        rounds = ROUNDS * sum(vm.memory.pages for vm in vms)
        end = host.schedule.time.now() + (rounds // scan + 1) * SECOND
        run_until(host, lambda: host.schedule.time.now() >= end)
        step("scanned")
        cost = Cost(
            count, forked, accounts(host.stock), sharing.scanned, host.memory.resident_bytes(),
            limit.most[OWN], limit.most[CODE], time.monotonic() - began,
        )  # fmt: skip
        for first in range(0, len(vms), at_once):
            some = vms[first : first + at_once]
            answers = ask_all(
                host, {vm: ANSWER.format(number=first + n) for n, vm in enumerate(some)}
            )
            for n, vm in enumerate(some):
                assert answers[vm] == f"/mine: OK\n{first + n + 1}\n", (vm.name, answers[vm])
        step("each has answered")
        assert all(vm.ended is None for vm in vms)
        for account in cost.told.vms:
            assert sum(account.kinds.values()) == account.size
        consumed = sum(account.consumed for account in cost.told.vms)
        assert cost.told.own + cost.told.free + consumed == cost.told.total
        return cost


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.walls.two_hundred")
    parser.add_argument("--vms", type=int, default=200)
    parser.add_argument("--forked", type=int, default=20)
    parser.add_argument("--memory", default="128M")
    parser.add_argument("--ram", default="22G")
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--swap", default=None)
    options = parser.parse_args()
    print(
        crowd(
            options.vms, options.forked, options.memory, options.ram, options.megabytes,
            options.at_once, options.swap, tell=True,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
