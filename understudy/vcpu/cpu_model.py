"""What the guest's CPUID shows: a present-day Intel-like processor, of the features we have.

Source: SDM 2A, "CPUID - CPU Identification".  Family 6, model F0H: one that no
processor has.  The guests' kernels know no defect of it, so that with IA32_ARCH_CAPABILITIES (see
`msrs.py`) Linux leaves out page-table isolation, retpolines, return thunks and buffer clearing,
which cost translated code far more than silicon.  And programs know no name for it: those that
GCC built in variants for named processors choose by the model alone, and would take a model with
AVX-512 at its name although the feature bits deny it.

Which features it has is a choice of the user, in the words of `cpu_features.py`.

Invariants: nothing is shown that `host_features` or the CR4 bits of the machine lack; what goes
with a feature (bits of CR4, MSRs, leaves) is there if and only if the feature is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from understudy.arch.address import MAXPHYADDR
from understudy.arch.bits import Bits
from understudy.arch.cpuid import (
    KvmFeatures,
    Leaf0AEax,
    Leaf0AEdx,
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub2Edx,
    LeafDSub1Eax,
    LeafExt1Ecx,
    LeafExt1Edx,
)
from understudy.arch.cr import CR4
from understudy.arch.msr import MiscEnable, Msr
from understudy.arch.topology import Topology
from understudy.guest import Guest
from understudy.vcpu.cpu_features import FEATURES, Choice
from understudy.vcpu.perfmon import (
    EVENTS,
    FIXED,
    FULL_WIDTH_MSRS,
    GENERAL,
    PERFMON_MSRS,
    UNCOUNTED,
    WIDTH,
)

Answer = tuple[int, int, int, int]
ZERO: Answer = (0, 0, 0, 0)
BRAND = b"understudy virtual processor, 1.00GHz"
SIGNATURE = 0x000F0600  # family 6, model F0H, stepping 0
TSC_HZ = 1_000_000_000
ONE: Final = Topology()
KVM_BASE = 0x4000_0000
EXTENDED_BASE = 0x8000_0000

ECX_FOLLOWS: Final = {
    1: (CR4.OSXSAVE.mask, Leaf1Ecx.OSXSAVE.mask),
    7: (CR4.PKE.mask, Leaf7Ecx.OSPKE.mask),
}
"""Bits of ECX that are those of CR4, by leaf."""
XSAVE_LEAF: Final = 0xD
COMPACTING: Final = int(LeafDSub1Eax(XSAVES=1, XSAVEC=1))  # without, sub-leaf 1 tells no size
X87_AND_SSE: Final = 0x3
AVX: Final = 1 << 2
PKRU: Final = 1 << 9
LEAST_AREA: Final = 576  # bytes of XSAVE's area: the legacy region and the header
AVX_AT, AVX_BYTES = 576, 256  # the upper halves of YMM registers, in both formats
PKRU_AT, PKRU_BYTES = 2688, 8  # in its standard format, as on Intel's processors

ALWAYS_CR4 = CR4(PCE=1)
"""Bits of CR4 that every guest may set."""
EFER_BITS: Final = {"syscall": 1 << 0, "lm": 1 << 8 | 1 << 10, "nx": 1 << 11}
"""Bits of IA32_EFER, by the features that bring them: SCE; LME and LMA; NXE."""
MSRS: Final[dict[str, tuple[int, ...]]] = {
    "x2apic": tuple(range(0x800, 0x900)),
    "tsc_deadline": (Msr.IA32_TSC_DEADLINE,),
    "tsc_adjust": (Msr.IA32_TSC_ADJUST,),
    "arch_capabilities": (Msr.IA32_ARCH_CAPABILITIES,),
    "ibrs_ibpb": (Msr.IA32_SPEC_CTRL, Msr.IA32_PRED_CMD),
    "pmu": PERFMON_MSRS,
    "pdcm": FULL_WIDTH_MSRS,
    "pks": (Msr.IA32_PKRS,),
    "xsaves": (Msr.IA32_XSS,),
    "clocksource": (Msr.KVM_WALL_CLOCK, Msr.KVM_SYSTEM_TIME),
    "clocksource2": (Msr.KVM_WALL_CLOCK_NEW, Msr.KVM_SYSTEM_TIME_NEW),
    "steal_time": (Msr.KVM_STEAL_TIME,),
    "pv_eoi": (Msr.KVM_PV_EOI,),
    "poll_control": (Msr.KVM_POLL_CONTROL,),
    "async_pf": (Msr.KVM_ASYNC_PF_EN,),
    "async_pf_int": (Msr.KVM_ASYNC_PF_INT, Msr.KVM_ASYNC_PF_ACK),
    "mca": (Msr.IA32_MCG_CAP, Msr.IA32_MCG_STATUS),
    "mtrr": (
        Msr.IA32_MTRRCAP, Msr.IA32_MTRR_DEF_TYPE, Msr.IA32_MTRR_FIX64K_00000,
        Msr.IA32_MTRR_FIX16K_80000, Msr.IA32_MTRR_FIX16K_A0000,
        *range(Msr.IA32_MTRR_PHYSBASE0, Msr.IA32_MTRR_PHYSMASK7 + 1),
        *range(Msr.IA32_MTRR_FIX4K_C0000, Msr.IA32_MTRR_FIX4K_F8000 + 1),
    ),
}  # fmt: skip
"""MSRs that exist only with a feature, of those that exit."""


def cache(level: int, kind: int, ways: int, sets: int, sharing: int = 0) -> Answer:
    """One sub-leaf of leaf 4.  kind: 1 data, 2 instruction, 3 unified; lines of 64 bytes.

    sharing: bits of the APIC ID in which processors that share it differ.
    """
    eax = ((1 << sharing) - 1) << 14 | 1 << 8 | level << 5 | kind
    return (eax, (ways - 1) << 22 | 63, sets - 1, 0)


def area_bytes(components: int, *, is_compacted: bool = False) -> int:
    """How large XSAVE's area is with these components."""
    least = AVX_AT + AVX_BYTES if components & AVX else LEAST_AREA
    if not components & PKRU:
        return least
    return (least if is_compacted else PKRU_AT) + PKRU_BYTES


@dataclass
class CpuModel:
    """The processor as one vCPU sees it."""

    features: Mapping[str, bool] = field(default_factory=dict)  # of the computer, by short name
    text: str = "understudy"  # what the user chose, as `Choice.of` reads it
    apic_id: int = 0
    physical_bits: int = MAXPHYADDR
    cr4_available: int = (1 << 64) - 1  # to the technique
    topology: Topology = ONE

    def __post_init__(self) -> None:
        self.is_xd_off = False  # IA32_MISC_ENABLE: XD Bit Disable
        self.shown = Choice.of(self.text).made(self.features, self.cr4_available)
        self.plain: dict[int, Answer] = {}
        self.indexed: dict[int, dict[int, Answer]] = {}  # leaves that look at ECX
        self._basic()
        if "hypervisor" in self.shown:
            self._kvm()
        self._extended()
        self.full = (self.plain[0], self.plain[1], self.plain[EXTENDED_BASE + 1])
        self.max_basic = max(leaf for leaf in self.plain if leaf < KVM_BASE)
        self.past_basic = range(
            self.max_basic + 1, KVM_BASE if KVM_BASE in self.plain else EXTENDED_BASE
        )
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
        past = leaf > self.max_extended or leaf in self.past_basic
        return self.plain[self.max_basic] if past else ZERO

    def enabled(self, leaf: int, subleaf: int, answer: Answer, guest: Guest) -> Answer:
        """An answer with what follows the guest's CR4 and XCR0 at this moment."""
        eax, ebx, ecx, edx = answer
        if leaf == XSAVE_LEAF and (subleaf == 0 or (subleaf == 1 and eax & COMPACTING)):
            ebx = area_bytes(guest.xcr0, is_compacted=subleaf == 1) if eax else 0
        elif leaf in ECX_FOLLOWS and (subleaf == 0 or leaf == 1):
            enables, shows = ECX_FOLLOWS[leaf]
            ecx |= shows if guest.control().cr4 & enables else 0
        return eax, ebx, ecx, edx

    def follow(self, *, has_apic: bool, misc: MiscEnable) -> None:
        """Show what registers leave of the features.

        SDM 3A, "Enabling or Disabling the Local APIC"; SDM 4, IA32_MISC_ENABLE.
        """
        leaf0, leaf1, extended = self.full
        hidden = 0 if has_apic else Leaf1Edx.APIC.mask
        self.plain[0] = (min(leaf0[0], 2) if misc.LIMIT_CPUID else leaf0[0], *leaf0[1:])
        self.plain[1] = (*leaf1[:3], leaf1[3] & ~hidden)
        self.is_xd_off = bool(misc.XD_DISABLE)
        hidden = LeafExt1Edx.NX.mask if self.is_xd_off else 0
        self.plain[EXTENDED_BASE + 1] = (*extended[:3], extended[3] & ~hidden)

    @property
    def cr4_allowed(self) -> CR4:
        """The bits of CR4 that the guest may set: those of the features shown."""
        wanted = int(ALWAYS_CR4)
        for name in self.shown:
            wanted |= FEATURES[name].cr4
        return CR4(wanted & self.cr4_available)

    @property
    def xcr0_allowed(self) -> int:
        """The state components that the guest may enable."""
        more = {"avx": AVX, "pku": PKRU}
        return X87_AND_SSE | sum(bit for name, bit in more.items() if name in self.shown)

    @property
    def efer_allowed(self) -> int:
        """The bits of IA32_EFER that the guest may set."""
        hidden = {"nx"} if self.is_xd_off else set()
        return sum(bits for name, bits in EFER_BITS.items() if name in self.shown - hidden)

    @property
    def hides_efer(self) -> bool:
        """Whether the machine has bits of IA32_EFER that the guest may not set."""
        return self.efer_allowed != sum(EFER_BITS.values())

    @property
    def hidden_msrs(self) -> frozenset[int]:
        """MSRs that do not exist because their feature is not shown."""
        hidden = (indices for name, indices in MSRS.items() if name not in self.shown)
        return frozenset(index for indices in hidden for index in indices)

    def _word(self, word: type[Bits]) -> int:
        """One register of CPUID: the bits of the features shown."""
        rows = (FEATURES[name] for name in self.shown)
        return int(word(**{one.bit: 1 for one in rows if one.word is word}))

    def _basic(self) -> None:
        thread, package = self.topology.thread_bits, self.topology.package_bits
        ebx1 = self.apic_id << 24 | 1 << package << 16 | 8 << 8
        edx1 = self._word(Leaf1Edx) | (Leaf1Edx.HTT.mask if package else 0)
        cores = ((1 << package - thread) - 1) << 26
        vendor = [int.from_bytes(b"GenuineIntel"[i : i + 4], "little") for i in (0, 4, 8)]
        self.plain |= {
            0x0: (0x16, vendor[0], vendor[2], vendor[1]),
            0x1: (SIGNATURE, ebx1, self._word(Leaf1Ecx), edx1),
            0x2: (0x00FE_FF01, 0xF0, 0, 0),  # "see leaf 4", 64-byte prefetch
            0x6: (1 << 2, 0, 0, 0),  # the APIC timer always runs
            0x15: (1, 1, TSC_HZ, 0),  # TSC = crystal clock = 1 GHz
            0x16: (1000, 1000, 100, 0),
        }
        self.indexed |= {
            0x4: {
                number: (eax | cores, ebx, ecx, edx)
                for number, (eax, ebx, ecx, edx) in enumerate(
                    (
                        cache(level=1, kind=1, ways=12, sets=64, sharing=thread),
                        cache(level=1, kind=2, ways=8, sets=64, sharing=thread),
                        cache(level=2, kind=3, ways=16, sets=2048, sharing=thread),
                        cache(level=3, kind=3, ways=16, sets=16384, sharing=package),
                    )
                )
            },
            0x7: {
                0: (2, self._word(Leaf7Ebx), self._word(Leaf7Ecx), self._word(Leaf7Edx)),
                2: (0, 0, 0, self._word(Leaf7Sub2Edx)),
            },
        }
        if "pmu" in self.shown:
            counters = Leaf0AEax(EVENTS=EVENTS, BITS=WIDTH, COUNTERS=GENERAL, VERSION=2)
            fixed = Leaf0AEdx(FIXED_BITS=WIDTH, FIXED_COUNTERS=FIXED)
            self.plain[0xA] = (int(counters), UNCOUNTED, 0, int(fixed))
        if "xsave" in self.shown:
            self.indexed[XSAVE_LEAF] = {
                0: (self.xcr0_allowed, LEAST_AREA, area_bytes(self.xcr0_allowed), 0),
                1: (self._word(LeafDSub1Eax), 0, 0, 0),
            }
            if "avx" in self.shown:
                self.indexed[XSAVE_LEAF][2] = (AVX_BYTES, AVX_AT, 0, 0)
            if "pku" in self.shown:
                self.indexed[XSAVE_LEAF][9] = (PKRU_BYTES, PKRU_AT, 0, 0)
        if "x2apic" in self.shown:  # "Extended Topology Enumeration": by x2APIC ID
            self.indexed[0xB] = {
                0: (thread, self.topology.threads, 1 << 8, self.apic_id),
                1: (package, self.topology.cores * self.topology.threads, 2 << 8 | 1, self.apic_id),
            }

    def _kvm(self) -> None:
        name = [int.from_bytes(b"KVMKVMKVM\0\0\0"[i : i + 4], "little") for i in (0, 4, 8)]
        self.plain[KVM_BASE] = (KVM_BASE + 1, name[0], name[1], name[2])
        self.plain[KVM_BASE + 1] = (self._word(KvmFeatures), 0, 0, 0)

    def _extended(self) -> None:
        words = [
            int.from_bytes(BRAND.ljust(48, b"\0")[i : i + 4], "little") for i in range(0, 48, 4)
        ]
        self.plain |= {
            EXTENDED_BASE: (EXTENDED_BASE + 8, 0, 0, 0),
            EXTENDED_BASE + 1: (0, 0, self._word(LeafExt1Ecx), self._word(LeafExt1Edx)),
            EXTENDED_BASE + 2: (words[0], words[1], words[2], words[3]),
            EXTENDED_BASE + 3: (words[4], words[5], words[6], words[7]),
            EXTENDED_BASE + 4: (words[8], words[9], words[10], words[11]),
            EXTENDED_BASE + 5: ZERO,
            EXTENDED_BASE + 6: (0, 0, 2048 << 16 | 8 << 12 | 64, 0),  # L2: 2 MBytes
            EXTENDED_BASE + 7: (0, 0, 0, 1 << 8),  # invariant TSC
            EXTENDED_BASE + 8: (48 << 8 | self.physical_bits, 0, 0, 0),
        }
