"""A guest that computes for minutes of wall time: right, level in memory, on time, never stalled.

What: compressing and hashing in a loop on the wall clock, every result checked; the process's
memory and its generated code after a warm-up; the guest's clock against the computer's.
Source: none.  UNDERSTUDY_ENDURANCE_SECONDS sets how long (600 unless told).
Invariant: what is measured is compared with itself earlier in the same run.
"""

import hashlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.matrix.lockstep import linux
from understudy.linux import VM

SECONDS = float(os.environ.get("UNDERSTUDY_ENDURANCE_SECONDS", "600"))
WARM_UP = 0.2  # of the time
GROWTH = 1.10
# What the guest's clock may be off: it is read in hundredths, and its tick is calibrated.
SLACK_S, DRIFT = 0.05, 100e-6
STALL_S = 60.0  # a round takes about a second

# Compressed twice over and hashed; the sum of the data itself tells where an error came in.
ROUND = """
seq {first} {last} >/tmp/data && sha256sum </tmp/data &&
gzip -c /tmp/data >/tmp/data.gz && gunzip -c /tmp/data.gz | sha256sum &&
bzip2 -c /tmp/data | bunzip2 -c | sha256sum
"""


@dataclass
class Sample:
    before: float  # seconds, of the computer's clock
    after: float
    uptime: float  # seconds, of the guest's
    resident: int  # bytes
    code: int  # bytes that the translator generated


def resident() -> int:
    """Bytes of this process that the computer holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def one_round(vm: VM, n: int) -> Sample:
    first, last = 1000 * n, 1000 * n + 30_000
    data = "".join(f"{i}\n" for i in range(first, last + 1)).encode()
    right = hashlib.sha256(data).hexdigest()
    command = ROUND.format(first=first, last=last)
    lines = vm.run(command, timeout_wall_s=STALL_S).check().output.splitlines()
    assert lines[:3] == [f"{right}  -"] * 3, f"round {n}"
    before = time.monotonic()
    uptime = float(vm.run("cut -d' ' -f1 /proc/uptime", timeout_wall_s=STALL_S).output)
    code = vm.counts()["engine"]["code_bytes"]
    return Sample(before, time.monotonic(), uptime, resident(), code)


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("engine", ["dbt"])
def test_a_guest_that_computes(engine: str) -> None:
    with linux(engine, clock="wall") as vm:
        vm.wait_for_agent()
        began, samples = time.monotonic(), list[Sample]()
        while time.monotonic() < began + SECONDS:
            samples.append(one_round(vm, len(samples) + 1))
        print(_report(samples, vm))
    warm = [s for s in samples if s.before >= began + WARM_UP * SECONDS]
    assert len(warm) >= 2, "too short a run to tell"
    assert max(s.resident for s in warm) <= GROWTH * warm[0].resident
    assert max(s.code for s in warm) <= GROWTH * warm[0].code
    # One offset between the clocks suits all samples.
    elapsed = samples[-1].after - samples[0].before
    lowest = max(s.uptime - s.after for s in samples)
    highest = min(s.uptime - s.before for s in samples)
    assert lowest - highest <= SLACK_S + DRIFT * elapsed


def _report(samples: list[Sample], vm: VM) -> str:
    spans = [b.before - a.before for a, b in itertools.pairwise(samples)]
    first, last = samples[0], samples[-1]
    drift = (last.uptime - last.after) - (first.uptime - first.after)
    return (
        f"{len(samples)} rounds, a round {min(spans):.2f} to {max(spans):.2f} s; resident "
        f"{first.resident >> 20} to {last.resident >> 20} MiB; drift {drift * 1e3:.0f} ms; "
        f"{vm.instructions / 1e9:.1f} G instructions; {vm.counts()['engine']}"
    )
