"""Binary translation: the guest's kernel runs as its translation, its programs as they are.

Source: lecture, "Dealing with problematic ISAs"; Adams and Agesen, "A Comparison of Software and
Hardware Techniques for x86 Virtualization".
"""

from understudy.execution.bt.technique import Bt

__all__ = ["Bt"]
