"""Interpretation: the hypervisor carries out the guest's instructions one by one.

Source: lecture, "Dealing with problematic ISAs".
"""

from understudy.execution.emulate.technique import Emulate

__all__ = ["Emulate"]
