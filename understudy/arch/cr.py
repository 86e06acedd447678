"""Control registers and RFLAGS.

Source: SDM 3A, "Control Registers", "System Flags and Fields in the EFLAGS Register".
"""

from typing import Final

from understudy.arch.bits import Bit, Bits


class CR0(Bits, width=64):
    """SDM 3A, "Control Registers"."""

    PG = Bit(31)  # paging
    CD = Bit(30)  # cache disable
    NW = Bit(29)  # not write-through
    AM = Bit(18)  # alignment mask
    WP = Bit(16)  # write protect
    NE = Bit(5)  # numeric error
    ET = Bit(4)  # extension type: always 1
    TS = Bit(3)  # task switched
    EM = Bit(2)  # emulation
    MP = Bit(1)  # monitor coprocessor
    PE = Bit(0)  # protection enable


class CR4(Bits, width=64):
    """SDM 3A, "Control Registers"."""

    PKS = Bit(24)
    CET = Bit(23)
    PKE = Bit(22)
    SMAP = Bit(21)
    SMEP = Bit(20)
    OSXSAVE = Bit(18)
    PCIDE = Bit(17)
    FSGSBASE = Bit(16)
    SMXE = Bit(14)
    VMXE = Bit(13)
    LA57 = Bit(12)
    UMIP = Bit(11)
    OSXMMEXCPT = Bit(10)
    OSFXSR = Bit(9)
    PCE = Bit(8)
    PGE = Bit(7)
    MCE = Bit(6)
    PAE = Bit(5)
    PSE = Bit(4)
    DE = Bit(3)
    TSD = Bit(2)
    PVI = Bit(1)
    VME = Bit(0)


class RFLAGS(Bits, width=64):
    """SDM 3A, "System Flags and Fields in the EFLAGS Register"."""

    ID = Bit(21)
    VIP = Bit(20)
    VIF = Bit(19)
    AC = Bit(18)
    VM = Bit(17)
    RF = Bit(16)
    NT = Bit(14)
    OF = Bit(11)
    DF = Bit(10)
    IF = Bit(9)
    TF = Bit(8)
    SF = Bit(7)
    ZF = Bit(6)
    AF = Bit(4)
    PF = Bit(2)
    CF = Bit(0)


RESET_DEBUG: Final = {"cr2": 0, "dr0": 0, "dr1": 0, "dr2": 0, "dr3": 0, "dr6": 0xFFFF_0FF0}
"""CR2 and the debug registers after reset and INIT, by the names of `Processor.registers`."""
