"""What a context switch costs, in calls: of the machine, and of functions.

Source: ours.  Counts, not times: they are the same on every computer.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any, Final

from tests.matrix.shared import spinning
from understudy.host import Host
from understudy.sched.share import Share
from understudy.silicon import Processor
from understudy.turns import TURN_NS

TURNS: Final = 40
MACHINE: Final = 8
"""VMCLEAR, VMPTRLD, what is live saved and loaded, whether an interrupt of the counters waits, and
three fields read that say whether an interrupt wakes it."""
FUNCTIONS: Final = 43


def calls(slice_turns: int) -> Counter[str]:
    """Those of so many turns of two VMs that compute; if a slice is one turn, all switch."""
    found: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            found["functions"] += 1
        elif event == "c_call" and isinstance(getattr(what, "__self__", None), Processor):
            found["machine"] += 1

    with Host(pcpus=1, ram="64M", policy=Share(slice_ns=slice_turns * TURN_NS)) as host:
        vms = [spinning(host, name) for name in "ab"]
        host.run(deadline_ns=8 * TURN_NS)
        before = switches(host)
        sys.setprofile(count)
        try:
            host.run(deadline_ns=(8 + TURNS) * TURN_NS)
        finally:
            sys.setprofile(None)
        found["switches"] = switches(host) - before
        for vm in vms:
            vm.close()
    return found


def switches(host: Host) -> int:
    return sum(host.schedule.pcpus[0].switches.values())


def test_a_switch_is_few_calls() -> None:
    rarely, each = calls(100 * TURNS), calls(1)
    assert (rarely["switches"], each["switches"]) == (0, TURNS)
    more = {name: (each[name] - rarely[name]) / TURNS for name in ("machine", "functions")}
    assert more["machine"] <= MACHINE and more["functions"] <= FUNCTIONS, more
