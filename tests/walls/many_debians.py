"""Many Debians on one host: all answer, though some compute and one after the other crashes.

    python -m tests.walls.many_debians [--vms 32] [--minutes 10] [--clock wall]

What: each VM is asked something every `PERIOD_S`; some compute all the time; at the end of each
minute one resets itself by a triple fault, which is its end, and a new one is booted in its place
while the others go on.
Source: Linux's reboot=t (Documentation/admin-guide/kernel-parameters.txt).
Invariants: an answer is right, and comes before the next question; it ends with status 1 if one is
late, or if the process grows by more than `GROWTH` after its first minute.
"""

import argparse
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.walls.asking import SECOND, ask, ask_all, run_until, until_booted
from understudy.host import Host
from understudy.linux import VM
from understudy.verdict import StopKind

PERIOD_S: Final = 10
PERIODS: Final = 6  # of a minute
GROWTH: Final = 1.10
MEMORY: Final = "128M"
COMPUTE: Final = "while :; do :; done >/dev/null 2>&1 &"
CRASH: Final = "reboot -f"
CRASHED_S: Final = 60
BOOTED_S: Final = 3600


@dataclass
class Report:
    """What was seen."""

    waits: list[int] = field(default_factory=list)  # ns of host time, of each answer
    late: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # bytes of this process, at each minute
    crashes: int = 0

    def __str__(self) -> str:
        longest, mean = max(self.waits), sum(self.waits) / len(self.waits)
        return (
            f"{len(self.waits)} answers, on average after {mean / 1e6:.1f} ms, the longest wait "
            f"{longest / 1e6:.1f} ms; {self.crashes} crashes; resident at each minute, in MBytes: "
            f"{', '.join(f'{one >> 20}' for one in self.resident)}; late: {self.late or 'none'}"
        )


class ManyDebians:
    """A host of two pCPUs full of them."""

    def __init__(self, host: Host, count: int, computing: int, *, copies: bool = False) -> None:
        """`copies`: only the first one is booted, and the others are restored from it."""
        self.host, self.report, self.chance = host, Report(), random.Random(1)
        self._saved = b""
        self._number = 0
        self.vms: dict[str, VM] = {}
        if copies:
            first = self._booted("copied")
            until_booted(host, [first], BOOTED_S)
            self._saved = first.save()
            first.close()
        for _ in range(count):
            self._add()
        until_booted(host, list(self.vms.values()), BOOTED_S)
        self.computing = list(self.vms)[:computing]
        ask_all(host, {self.vms[name]: COMPUTE for name in self.computing}, BOOTED_S)

    def _booted(self, name: str) -> VM:
        return self.host.linux(
            "cloud-amd64", memory=MEMORY, name=name, append="reboot=t", triple_fault="stop"
        )

    def _add(self) -> str:
        name = f"vm{self._number}"
        self._number += 1
        self.vms[name] = (
            VM.restore(self._saved, host=self.host) if self._saved else self._booted(name)
        )
        return name

    def period(self, seconds: float) -> None:
        """All are asked at once, and have so long to answer."""
        report, now = self.report, self.host.schedule.time.now
        began = now()
        waits = {}
        for name in self.vms:
            number = waits[name] = self.chance.randrange(1 << 30)

            def answered(heard: str, status: int, name: str = name, number: int = number) -> None:
                assert (heard, status) == (f"{number + 1}\n", 0), (name, heard, status)
                report.waits.append(now() - began)
                del waits[name]

            ask(self.vms[name], f"echo $(({number} + 1))", answered)
        end = began + int(seconds * SECOND)
        self.host.run(until=lambda: not waits, deadline_ns=end)
        report.late += list(waits)
        self.host.run(deadline_ns=end)

    def crash(self) -> None:
        """One that does not compute ends by a triple fault, and another is booted in its place."""
        name = self.chance.choice([name for name in self.vms if name not in self.computing])
        vm = self.vms[name]
        before = {one: its.instructions for one, its in self.vms.items()}
        ask(vm, CRASH, lambda heard, status: None)
        run_until(self.host, lambda: vm.ended is not None, CRASHED_S)
        assert vm.ended is not None and vm.ended.kind is StopKind.TRIPLE_FAULT, vm.ended
        vm.close()
        del self.vms[name]
        self.report.crashes += 1
        new = self._add()
        until_booted(self.host, [self.vms[new]], BOOTED_S)
        for one in self.computing:
            assert self.vms[one].ended is None and self.vms[one].instructions > before[one]

    def minute(self, periods: int = PERIODS, seconds: float = PERIOD_S) -> None:
        """So many periods, and a crash."""
        for _ in range(periods):
            self.period(seconds)
        self.crash()
        self.report.resident.append(resident())

    def close(self) -> None:
        """All end."""
        for vm in self.vms.values():
            vm.close()


def resident() -> int:
    """Bytes of this process that are in the computer's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.walls.many_debians")
    parser.add_argument("--vms", type=int, default=32)
    parser.add_argument("--computing", type=int, default=4)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "virtual"), default="wall")
    options = parser.parse_args()
    ram = f"{options.vms * 136 + 136}M"
    with Host(pcpus=2, ram=ram, clock=options.clock) as host:
        many = ManyDebians(host, options.vms, options.computing)
        for _ in range(options.minutes):
            many.minute()
            print(many.report, flush=True)
        many.close()
    report = many.report
    assert not report.late
    assert max(report.resident) <= GROWTH * report.resident[0]


if __name__ == "__main__":
    main()
