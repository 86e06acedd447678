"""Exceptions: vectors, and which of them push an error code.

Source: SDM 3A, "Exceptions and Interrupts", table "Protected-Mode Exceptions and Interrupts".
"""

from enum import IntEnum


class Vector(IntEnum):
    """Vectors 0 to 31, with the manual's mnemonics."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19


WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
