"""Paravirtualization: a kernel without privileges that knows it, and calls its hypervisor.

Source: lecture, "Para-virtualization"; P. Barham et al., "Xen and the Art of Virtualization", SOSP
2003.
"""

from understudy.execution.pv.technique import Pv

__all__ = ["Pv"]
