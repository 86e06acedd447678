"""What performance monitoring this processor has: its registers, and the events that it counts.

Source: SDM 3B, "Architectural Performance Monitoring Version 2"; SDM 2A, CPUID leaf 0AH.
Invariant: they are the machine's (`silicon/src/cpu/pmu.rs`), which counts.
"""

from typing import Final

from understudy.arch.msr import Msr

GENERAL, FIXED, WIDTH = 4, 3, 48
GLOBAL: Final = (1 << FIXED) - 1 << 32 | (1 << GENERAL) - 1
PERFMON_MSRS: Final = (
    *range(Msr.IA32_PMC0, Msr.IA32_PMC0 + GENERAL),
    *range(Msr.IA32_PERFEVTSEL0, Msr.IA32_PERFEVTSEL0 + GENERAL),
    *range(Msr.IA32_FIXED_CTR0, Msr.IA32_FIXED_CTR0 + FIXED),
    Msr.IA32_FIXED_CTR_CTRL, Msr.IA32_PERF_GLOBAL_STATUS, Msr.IA32_PERF_GLOBAL_CTRL,
    Msr.IA32_PERF_GLOBAL_OVF_CTRL,
)  # fmt: skip
"""What version 2 has."""
FULL_WIDTH_MSRS: Final = (
    Msr.IA32_PERF_CAPABILITIES,
    *range(Msr.IA32_A_PMC0, Msr.IA32_A_PMC0 + GENERAL),
)
"""What IA32_PERF_CAPABILITIES tells of: general counters that are written as a whole."""
COUNTED: Final = frozenset({0x00C0, 0x003C, 0x013C})
"""Events that are counted, unit mask and number: instructions, core and reference cycles."""
UNCOUNTED: Final = 0b1111000
"""CPUID.0AH:EBX: no last-level cache references and misses, no branches and mispredictions."""
EVENTS: Final = 7
