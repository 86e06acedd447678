"""The conditions of Jcc, SETcc and CMOVcc.

Source: SDM 1, "EFLAGS Condition Codes".
"""

from collections.abc import Callable
from typing import Final

from iced_x86 import ConditionCode

from understudy.instructions.arithmetic import CF, OF, PF, SF, ZF

Condition = Callable[[int], bool]
"""Of RFLAGS."""

_SIGNED: Final = frozenset(
    flags for flags in (0, SF, OF, SF | OF) if bool(flags & SF) != bool(flags & OF)
)
"""SF and OF, where they differ."""

CONDITIONS: Final[dict[int, Condition]] = {
    ConditionCode.O: lambda flags: flags & OF != 0,
    ConditionCode.NO: lambda flags: flags & OF == 0,
    ConditionCode.B: lambda flags: flags & CF != 0,
    ConditionCode.AE: lambda flags: flags & CF == 0,
    ConditionCode.E: lambda flags: flags & ZF != 0,
    ConditionCode.NE: lambda flags: flags & ZF == 0,
    ConditionCode.BE: lambda flags: flags & (CF | ZF) != 0,
    ConditionCode.A: lambda flags: flags & (CF | ZF) == 0,
    ConditionCode.S: lambda flags: flags & SF != 0,
    ConditionCode.NS: lambda flags: flags & SF == 0,
    ConditionCode.P: lambda flags: flags & PF != 0,
    ConditionCode.NP: lambda flags: flags & PF == 0,
    ConditionCode.L: lambda flags: flags & (SF | OF) in _SIGNED,
    ConditionCode.GE: lambda flags: flags & (SF | OF) not in _SIGNED,
    ConditionCode.LE: lambda flags: flags & ZF != 0 or flags & (SF | OF) in _SIGNED,
    ConditionCode.G: lambda flags: flags & ZF == 0 and flags & (SF | OF) not in _SIGNED,
}
