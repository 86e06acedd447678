"""A virtual processor: its run loop, its events, its MSRs, and what its CPUID shows."""
