"""Windows forced on: each program that can have one accesses memory by the computer's page tables.

What: for tests of what windows must not change.  Source: `Processor.use_windows`.  Invariant: none;
(left alone, programs of a second or two hardly get a window).
"""

from understudy.vm import VM

COUNTS = ("windows_opened", "window_fills", "window_drops", "window_strays")


def force_windows(vm: VM) -> None:
    """From now on."""
    for processor in vm.processors:
        processor.use_windows("always")


def window_counts(vm: VM) -> dict[str, int]:
    """What was done with windows so far."""
    counts = vm.counts()["engine"]
    return {name: counts[name] for name in COUNTS}
