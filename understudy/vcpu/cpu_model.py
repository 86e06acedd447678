"""What the guest's CPUID shows: a present-day Intel-like processor, of the features we have.

Source: SDM 2A, "CPUID - CPU Identification".  Family 6, model F0H: one that no
processor has.  The guests' kernels know no defect of it, so that with IA32_ARCH_CAPABILITIES (see
`msrs.py`) Linux leaves out page-table isolation, retpolines, return thunks and buffer clearing,
which cost translated code far more than silicon.  And programs know no name for it: those that
GCC built in variants for named processors choose by the model alone, and would take a model with
AVX-512 at its name although the feature bits deny it.

Left out on purpose: AVX and XSAVE (not in the machine), LA57, PKU, CET, VMX (nesting comes
later), RDRAND (two runs must be the same run).  SMAP is a switch: STAC and CLAC cost much.

Invariant: nothing is shown that `host_features` or the CR4 bits of the machine lack.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from understudy.arch.cpuid import (
    KvmFeatures,
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub2Edx,
    LeafExt1Ecx,
    LeafExt1Edx,
)
from understudy.arch.cr import CR4

Answer = tuple[int, int, int, int]
ZERO: Answer = (0, 0, 0, 0)
BRAND = b"understudy virtual processor, 1.00GHz"
SIGNATURE = 0x000F0600  # family 6, model F0H, stepping 0
TSC_HZ = 1_000_000_000
KVM_BASE = 0x4000_0000
EXTENDED_BASE = 0x8000_0000

ALWAYS_CR4 = CR4(OSXMMEXCPT=1, OSFXSR=1, PGE=1, MCE=1, PAE=1, PSE=1, DE=1, TSD=1)
"""Bits of CR4 that every guest may set."""


def cache(level: int, kind: int, ways: int, sets: int) -> Answer:
    """One sub-leaf of leaf 4.  kind: 1 data, 2 instruction, 3 unified; lines of 64 bytes."""
    return (1 << 8 | level << 5 | kind, (ways - 1) << 22 | 63, sets - 1, 0)


@dataclass
class CpuModel:
    """The processor as one vCPU sees it."""

    features: Mapping[str, bool] = field(default_factory=dict)  # of the computer, by short name
    smap: bool = False
    apic_id: int = 0
    physical_bits: int = 40
    cr4_available: int = (1 << 64) - 1  # IA32_VMX_CR4_FIXED1

    def __post_init__(self) -> None:
        self.plain: dict[int, Answer] = {}
        self.indexed: dict[int, dict[int, Answer]] = {}  # leaves that look at ECX
        self._basic()
        self._kvm()
        self._extended()
        self.max_basic = max(leaf for leaf in self.plain if leaf < KVM_BASE)
        self.max_kvm = KVM_BASE + 1
        self.max_extended = max(self.plain)

    def answer(self, leaf: int, subleaf: int) -> Answer:
        """EAX, EBX, ECX, EDX.

        A leaf past the end of its range shows the highest basic leaf, as on Intel processors.
        """
        row = self.plain.get(leaf)
        if row is not None:
            return row
        rows = self.indexed.get(leaf)
        if rows is not None:
            # Leaf 0BH goes on counting: ECX[7:0] is the sub-leaf that was asked for.
            return rows.get(subleaf, (0, 0, subleaf & 0xFF, self.apic_id) if leaf == 0xB else ZERO)
        past = leaf > self.max_extended or self.max_basic < leaf < KVM_BASE
        return self.plain[self.max_basic] if past else ZERO

    @property
    def cr4_allowed(self) -> CR4:
        """The bits of CR4 that the guest may set: those of the features shown."""
        wanted = ALWAYS_CR4.replace(
            FSGSBASE=1, PCIDE=1, SMEP=1, SMAP=int(self.smap), PCE=1, VME=1, PVI=1
        )
        return CR4(wanted & self.cr4_available)

    def _have(self, name: str) -> int:
        return int(bool(self.features.get(name, False)))

    def _basic(self) -> None:
        cr4 = self.cr4_allowed
        have = self._have
        ecx1 = Leaf1Ecx(
            HYPERVISOR=1, TSC_DEADLINE=1, X2APIC=1, CX16=1, SSE3=1, PCID=cr4.PCIDE,
            AES=have("aes"), PCLMULQDQ=have("pclmulqdq"), MOVBE=have("movbe"),
            POPCNT=have("popcnt"), SSSE3=have("ssse3"), SSE4_1=have("sse41"), SSE4_2=have("sse42"),
        )  # fmt: skip
        edx1 = Leaf1Edx(
            SS=1, SSE2=1, SSE=1, FXSR=1, MMX=1, CLFSH=1, PSE36=1, PAT=1, CMOV=1, MCA=1, PGE=1,
            MTRR=1, SEP=1, APIC=1, CX8=1, MCE=1, PAE=1, MSR=1, TSC=1, PSE=1, DE=1, VME=cr4.VME,
            FPU=1,
        )  # fmt: skip
        ebx7 = Leaf7Ebx(
            INVPCID=1, ERMS=1, TSC_ADJUST=1, FSGSBASE=cr4.FSGSBASE, SMEP=cr4.SMEP, SMAP=cr4.SMAP,
            BMI1=have("bmi1"), BMI2=have("bmi2"), ADX=have("adx"),
        )  # fmt: skip
        edx7 = Leaf7Edx(ARCH_CAPABILITIES=1, IBRS_IBPB=1, FSRM=1)
        vendor = [int.from_bytes(b"GenuineIntel"[i : i + 4], "little") for i in (0, 4, 8)]
        self.plain |= {
            0x0: (0x16, vendor[0], vendor[2], vendor[1]),
            0x1: (SIGNATURE, self.apic_id << 24 | 1 << 16 | 8 << 8, int(ecx1), int(edx1)),
            0x2: (0x00FE_FF01, 0xF0, 0, 0),  # "see leaf 4", 64-byte prefetch
            0x6: (1 << 2, 0, 0, 0),  # the APIC timer always runs
            0x15: (1, 1, TSC_HZ, 0),  # TSC = crystal clock = 1 GHz
            0x16: (1000, 1000, 100, 0),
        }
        self.indexed |= {
            0x4: {
                0: cache(level=1, kind=1, ways=12, sets=64),
                1: cache(level=1, kind=2, ways=8, sets=64),
                2: cache(level=2, kind=3, ways=16, sets=2048),
                3: cache(level=3, kind=3, ways=16, sets=16384),
            },
            0x7: {
                0: (2, int(ebx7), int(Leaf7Ecx(0)), int(edx7)),
                2: (0, 0, 0, int(Leaf7Sub2Edx(BHI_CTRL=1))),
            },
            0xB: {
                0: (0, 1, 1 << 8, self.apic_id),
                1: (0, 1, 2 << 8 | 1, self.apic_id),
            },
        }

    def _kvm(self) -> None:
        name = [int.from_bytes(b"KVMKVMKVM\0\0\0"[i : i + 4], "little") for i in (0, 4, 8)]
        offered = KvmFeatures(CLOCKSOURCE=1, NOP_IO_DELAY=1, CLOCKSOURCE2=1,
                              CLOCKSOURCE_STABLE_BIT=1)  # fmt: skip
        self.plain[KVM_BASE] = (KVM_BASE + 1, name[0], name[1], name[2])
        self.plain[KVM_BASE + 1] = (int(offered), 0, 0, 0)

    def _extended(self) -> None:
        lzcnt = self._have("lzcnt") & self._have("bmi1")
        ecx = LeafExt1Ecx(LAHF64=1, PREFETCHW=1, LZCNT=lzcnt)
        edx = LeafExt1Edx(LM=1, RDTSCP=1, PAGE_1G=1, NX=1, SYSCALL=1)
        words = [
            int.from_bytes(BRAND.ljust(48, b"\0")[i : i + 4], "little") for i in range(0, 48, 4)
        ]
        self.plain |= {
            EXTENDED_BASE: (EXTENDED_BASE + 8, 0, 0, 0),
            EXTENDED_BASE + 1: (0, 0, int(ecx), int(edx)),
            EXTENDED_BASE + 2: (words[0], words[1], words[2], words[3]),
            EXTENDED_BASE + 3: (words[4], words[5], words[6], words[7]),
            EXTENDED_BASE + 4: (words[8], words[9], words[10], words[11]),
            EXTENDED_BASE + 5: ZERO,
            EXTENDED_BASE + 6: (0, 0, 2048 << 16 | 8 << 12 | 64, 0),  # L2: 2 MBytes
            EXTENDED_BASE + 7: (0, 0, 0, 1 << 8),  # invariant TSC
            EXTENDED_BASE + 8: (48 << 8 | self.physical_bits, 0, 0, 0),
        }
