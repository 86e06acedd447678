"""Trap and emulate: the guest's kernel runs deprivileged, and what it may not do traps.

Source: lecture, "Dealing with problematic ISAs"; Popek and Goldberg, "Formal Requirements for
Virtualizable Third Generation Architectures".
"""

from understudy.execution.deprivileged.technique import Deprivileged

__all__ = ["Deprivileged"]
