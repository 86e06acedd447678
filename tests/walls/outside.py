"""What a process has of the computer's memory, as the kernel counts it, and what it may have.

What: the host's memory, what is translated, and all else, each page once however often it is
mapped.  (RssShmem counts what is translated twice, and a page of the host's memory as often as
windows show it.)
Source: proc_pid_smaps(5): the proportional set size of each mapping.
Invariants: a frame that the hypervisor says is free costs nothing; what is translated has a bound;
all else is no more than `BESIDE`, `EACH`, and a VM's budget for tables, for what is noted of them
(Python keeps what that once took).  So a process has no more than its RAM and these.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Final

from understudy.arch.address import PAGE
from understudy.host import Host

TRANSLATED: Final = 97 << 20
"""Bytes for each processor of the host: what silicon/src/dbt/cache.rs keeps, and a bit beside."""
EACH: Final = 4 << 20
"""For each VM: 240 Debians took 2.62 MBytes each (docs/results/overcommit.md); and half as much."""
BESIDE: Final = 64 << 20
"""Beside that, and as much as is translated for what is noted of it: two Debians took 69 MBytes in
all, most of it for the kernel's file and for Python's modules, which the first VM loads."""
ON_THE_WAY: Final = 64
"""Frames between the hypervisor's list and the computer's."""
HOST, CODE, OWN = "memfd:understudy", "memfd:understudy-code", "own"
_MAPPING: Final = re.compile(r"[\da-f]+-[\da-f]+ \S+ \S+ \S+ \d+ *(.*)")


def outside(process: str = "self") -> Counter[str]:
    """Bytes of a process, by its number: `HOST`, `CODE` and `OWN`."""
    found: Counter[str] = Counter()
    kind = counted = ""
    with Path(f"/proc/{process}/smaps").open() as lines:  # tens of MBytes
        for line in lines:
            if mapping := _MAPPING.match(line):
                name, _, deleted = mapping[1].partition(" ")
                kind = name.strip("/") if name.strip("/") in (HOST, CODE) else OWN
                is_file = name.startswith("/") and not deleted  # what it has can be read again
                counted = "Anonymous:" if is_file else "Pss:"
            elif line.startswith(counted):
                found[kind] += int(line.split()[1]) << 10
    return found


class Limit:
    """What this process may have with one host."""

    def __init__(self, host: Host) -> None:
        """Before its first VM."""
        self._host, self._before = host, outside()
        self.most: Counter[str] = Counter()
        """What was seen at most, beside what was there before."""

    def look(self) -> None:
        """AssertionError if it is more."""
        host, now = self._host, outside()
        now.subtract(self._before)
        now[HOST] = max(now[HOST], host.memory.resident_bytes())  # what nobody has mapped, too
        self.most |= now
        tables = sum(vm.pages.reserve.count for vm in host.vms)
        may = {
            HOST: (host.frames.count - host.frames.free_count + ON_THE_WAY) * PAGE,
            CODE: TRANSLATED * len(host.schedule.pcpus),
            OWN: BESIDE + EACH * len(host.vms) + now[CODE] + PAGE * tables,
        }
        much = [f"{kind}: {now[kind]} bytes, expected {may[kind]}" for kind in may
                if now[kind] > may[kind]]  # fmt: skip
        assert not much, much
