"""CPUID: the feature words that the CPU model sets.

Source: SDM 2A, "CPUID - CPU Identification"; the KVM leaves: the Linux kernel's documentation,
"KVM CPUID bits".
"""

from understudy.arch.bits import Bit, Bits, Field


class Leaf1Ecx(Bits, width=32):
    """CPUID.01H:ECX."""

    HYPERVISOR = Bit(31)
    RDRAND = Bit(30)
    F16C = Bit(29)
    AVX = Bit(28)
    OSXSAVE = Bit(27)
    XSAVE = Bit(26)
    AES = Bit(25)
    TSC_DEADLINE = Bit(24)
    POPCNT = Bit(23)
    MOVBE = Bit(22)
    X2APIC = Bit(21)
    SSE4_2 = Bit(20)
    SSE4_1 = Bit(19)
    PCID = Bit(17)
    PDCM = Bit(15)
    CX16 = Bit(13)
    FMA = Bit(12)
    SSSE3 = Bit(9)
    VMX = Bit(5)
    MONITOR = Bit(3)
    PCLMULQDQ = Bit(1)
    SSE3 = Bit(0)


class Leaf1Edx(Bits, width=32):
    """CPUID.01H:EDX."""

    HTT = Bit(28)
    SS = Bit(27)
    SSE2 = Bit(26)
    SSE = Bit(25)
    FXSR = Bit(24)
    MMX = Bit(23)
    CLFSH = Bit(19)
    PSE36 = Bit(17)
    PAT = Bit(16)
    CMOV = Bit(15)
    MCA = Bit(14)
    PGE = Bit(13)
    MTRR = Bit(12)
    SEP = Bit(11)
    APIC = Bit(9)
    CX8 = Bit(8)
    MCE = Bit(7)
    PAE = Bit(6)
    MSR = Bit(5)
    TSC = Bit(4)
    PSE = Bit(3)
    DE = Bit(2)
    VME = Bit(1)
    FPU = Bit(0)


class Leaf7Ebx(Bits, width=32):
    """CPUID.(EAX=07H,ECX=0):EBX."""

    SHA = Bit(29)
    CLWB = Bit(24)
    CLFLUSHOPT = Bit(23)
    SMAP = Bit(20)
    ADX = Bit(19)
    RDSEED = Bit(18)
    FDP_DEPRECATED = Bit(13)  # CS and DS selectors of the FPU are always 0
    INVPCID = Bit(10)
    ERMS = Bit(9)
    BMI2 = Bit(8)
    SMEP = Bit(7)
    AVX2 = Bit(5)
    BMI1 = Bit(3)
    TSC_ADJUST = Bit(1)
    FSGSBASE = Bit(0)


class Leaf7Ecx(Bits, width=32):
    """CPUID.(EAX=07H,ECX=0):ECX."""

    PKS = Bit(31)
    RDPID = Bit(22)
    LA57 = Bit(16)
    OSPKE = Bit(4)
    PKU = Bit(3)
    UMIP = Bit(2)


class Leaf7Edx(Bits, width=32):
    """CPUID.(EAX=07H,ECX=0):EDX."""

    SSBD = Bit(31)
    ARCH_CAPABILITIES = Bit(29)
    STIBP = Bit(27)
    IBRS_IBPB = Bit(26)
    MD_CLEAR = Bit(10)
    FSRM = Bit(4)


class Leaf7Sub2Edx(Bits, width=32):
    """CPUID.(EAX=07H,ECX=2):EDX."""

    BHI_CTRL = Bit(4)  # IA32_SPEC_CTRL.BHI_DIS_S exists
    RRSBA_CTRL = Bit(2)


class LeafDSub1Eax(Bits, width=32):
    """CPUID.(EAX=0DH,ECX=1):EAX."""

    XSAVES = Bit(3)
    XGETBV1 = Bit(2)  # XGETBV with ECX = 1
    XSAVEC = Bit(1)
    XSAVEOPT = Bit(0)


class LeafExt1Ecx(Bits, width=32):
    """CPUID.80000001H:ECX."""

    PREFETCHW = Bit(8)
    LZCNT = Bit(5)
    LAHF64 = Bit(0)


class LeafExt1Edx(Bits, width=32):
    """CPUID.80000001H:EDX."""

    LM = Bit(29)
    RDTSCP = Bit(27)
    PAGE_1G = Bit(26)
    NX = Bit(20)
    SYSCALL = Bit(11)


class Leaf0AEax(Bits, width=32):
    """CPUID.0AH:EAX: architectural performance monitoring."""

    EVENTS = Field(31, 24)  # bits of EBX that say something
    BITS = Field(23, 16)  # of a general counter
    COUNTERS = Field(15, 8)
    VERSION = Field(7, 0)


class Leaf0AEdx(Bits, width=32):
    """CPUID.0AH:EDX."""

    FIXED_BITS = Field(12, 5)
    FIXED_COUNTERS = Field(4, 0)


class KvmFeatures(Bits, width=32):
    """CPUID.40000001H:EAX."""

    CLOCKSOURCE_STABLE_BIT = Bit(24)
    ASYNC_PF_INT = Bit(14)
    POLL_CONTROL = Bit(12)
    PV_TLB_FLUSH = Bit(9)
    PV_UNHALT = Bit(7)
    PV_EOI = Bit(6)
    STEAL_TIME = Bit(5)
    ASYNC_PF = Bit(4)
    CLOCKSOURCE2 = Bit(3)
    NOP_IO_DELAY = Bit(1)
    CLOCKSOURCE = Bit(0)
