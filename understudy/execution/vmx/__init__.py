"""Execution in VMX non-root operation: the only room that names fields of the VMCS.

Source: lecture, "Hardware support: Intel VT-x"; SDM 3C, "Virtual Machine Control Structures".
"""

from understudy.execution.vmx.technique import Vmx

__all__ = ["Vmx"]
