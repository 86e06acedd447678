"""Published prices in cycles, by which experiments weigh what they have counted.

Source: K. Adams and O. Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization", ASPLOS 2006: nanobenchmarks and table 1, a Pentium 4 672 of 3.8 GHz; its software
VMM translates, its hardware VMM has VT-x and shadow page tables.  Second-hand: as benchmarks and
notes that are public quote the paper.  `SYSCALL` and the native CR8 write are from memory, and
decide nothing but an order.  Invariant: no number here was measured by this project.
"""

from collections.abc import Mapping
from typing import Final

SYSCALL: Final = 242
NATIVE: Final = {
    "syscall": SYSCALL, "in": 3209, "cr8wr": 140, "callret": 11, "pgfault": 1093, "divzero": 889,
    "ptemod": 1,
}  # fmt: skip
SOFTWARE: Final = {
    "syscall": SYSCALL + 2000, "in": 214, "cr8wr": 35, "callret": 51, "pgfault": 3927,
    "divzero": 3223, "ptemod": 391,
}  # fmt: skip
HARDWARE: Final = {
    "syscall": SYSCALL, "in": 15826, "cr8wr": 140, "callret": 11, "pgfault": 11242,
    "divzero": 1014, "ptemod": 12733,
}  # fmt: skip
SOFTWARE_FIRST: Final = ("in", "cr8wr", "pgfault", "ptemod")
"""Where the paper's software VMM is the faster one; in all others its hardware VMM is."""

VM_ENTRY, FAULT_EXIT, VMCB_READ = 2409, 1931, 178
BARE_EXIT: Final = FAULT_EXIT + VM_ENTRY + VMCB_READ
"""An exit in which nothing is done, and the entry after it."""

FORK_WAIT: Final = {"native": 6.0, "software": 36.9, "hardware": 106.4}
"""Seconds for 40,000 times fork and wait."""
FORK_WAIT_RATIO: Final = (FORK_WAIT["hardware"] - FORK_WAIT["native"]) / (
    FORK_WAIT["software"] - FORK_WAIT["native"]
)
"""Overhead of hardware by that of software: 3.25.  (The paper's prose has 4.4.)"""

BY_HARDWARE: Final = {
    "true": HARDWARE["pgfault"] - NATIVE["pgfault"],
    "trace": HARDWARE["ptemod"] - NATIVE["ptemod"],
    "hidden": HARDWARE["pgfault"] - NATIVE["pgfault"],
    "called out": 0,  # by translated code alone
    "other": BARE_EXIT,
}
BY_SOFTWARE: Final = {
    "true": SOFTWARE["pgfault"] - NATIVE["pgfault"],
    "trace": SOFTWARE["pgfault"] - NATIVE["pgfault"],
    "hidden": SOFTWARE["pgfault"] - NATIVE["pgfault"],
    "called out": SOFTWARE["ptemod"] - NATIVE["ptemod"],
    "other": SOFTWARE["divzero"] - NATIVE["divzero"],
}
"""What one event adds.  A hidden fault has no price of its own and takes that of a true one; so has
a trace fault in software, where the paper's translator adapts and has none.  Another crossing is an
exit in which nothing is done; in software, what a divide error adds: into the monitor and out.
"""


def added(kinds: Mapping[str, float], prices: Mapping[str, int]) -> float:
    """Cycles that these events add."""
    return sum(often * prices[kind] for kind, often in kinds.items())
