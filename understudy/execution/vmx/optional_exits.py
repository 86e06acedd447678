"""Exits that no guest of ours needs, and that a user may ask for: `--exit NAME`.

With each, an instruction that the processor would have carried out by itself comes to the
hypervisor, which does the same.  The guest cannot tell; what it costs can be counted.

Source: SDM 3C, "VM-Execution Control Fields", "Instructions That Cause VM Exits Conditionally".
Invariant: guest-visible state and guest time are those without the exit.
"""

from typing import Final, NamedTuple

from understudy.arch.vmx_controls import PrimaryControls, SecondaryControls


class OptionalExit(NamedTuple):
    """The controls that ask for it, and what a hypervisor would want it for."""

    words: str
    primary: int = 0
    secondary: int = 0


OPTIONAL: Final[dict[str, OptionalExit]] = {
    "cr3": OptionalExit(
        "MOV to and from CR3: both of the following",
        int(PrimaryControls(CR3_LOAD_EXITING=1, CR3_STORE_EXITING=1)),
    ),
    "cr3-load": OptionalExit(
        "MOV to CR3: to know whose turn it is, and to shadow page tables",
        int(PrimaryControls(CR3_LOAD_EXITING=1)),
    ),
    "cr3-store": OptionalExit(
        "MOV from CR3: to hide that the processor has another table",
        int(PrimaryControls(CR3_STORE_EXITING=1)),
    ),
    "invlpg": OptionalExit(
        "INVLPG: to keep shadow page tables; INVPCID exits with it",
        int(PrimaryControls(INVLPG_EXITING=1)),
    ),
    "pause": OptionalExit(
        "PAUSE: to let others run while a guest spins",
        int(PrimaryControls(PAUSE_EXITING=1)),
    ),
    "rdtsc": OptionalExit(
        "RDTSC, RDTSCP: to show a time of the hypervisor's own",
        int(PrimaryControls(RDTSC_EXITING=1)),
    ),
    "rdpmc": OptionalExit(
        "RDPMC: to show counters that the processor has not, or to hide those it has",
        int(PrimaryControls(RDPMC_EXITING=1)),
    ),
    "wbinvd": OptionalExit(
        "WBINVD: where a device reads memory without looking into the caches",
        0,
        int(SecondaryControls(WBINVD_EXITING=1)),
    ),
}
"""By name."""


def controls(names: tuple[str, ...]) -> tuple[int, int]:
    """Bits of the primary and of the secondary controls."""
    primary = secondary = 0
    for name in names:
        primary |= OPTIONAL[name].primary
        secondary |= OPTIONAL[name].secondary
    return primary, secondary
