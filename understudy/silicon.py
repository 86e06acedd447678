"""The pins: the only door between the hypervisor (Python) and the machine (Rust).

Everything that Python can ask of the machine is named here; `_silicon.pyi` is its data sheet.
"""

from understudy._silicon import (
    LAYOUTS,
    Exit,
    LocalApic,
    Memory,
    Native,
    Processor,
    VmFail,
    hold_signals,
    host_features,
    wall_tsc,
)

__all__ = [
    "LAYOUTS",
    "Exit",
    "LocalApic",
    "Memory",
    "Native",
    "Processor",
    "VmFail",
    "hold_signals",
    "host_features",
    "wall_tsc",
]
