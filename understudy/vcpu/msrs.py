"""The guest's model-specific registers, as far as they exit.

Source: SDM 4, "Architectural MSRs"; for the values that keep Linux from needless mitigations,
`ArchCapabilities` says of each defect that this processor does not have it.

Three kinds: values that are kept (`State.values`), values computed by functions (the APIC, the
TSC, KVM's clocks), and all others, which raise #GP(0) as on hardware and are counted.

Invariants: a reserved bit that is set is #GP(0); an MSR that the CPU model hides does not exist.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from understudy.arch.msr import ApicBase, ArchCapabilities, DebugCtl, MiscEnable, Msr, SpecCtrl
from understudy.guest import Guest
from understudy.silicon import LocalApic
from understudy.state import U64, Part
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.perfmon import FULL_WIDTH_MSRS, PERFMON_MSRS
from understudy.vcpu.pmu import Pmu
from understudy.vcpu.time import GuestClock

MASK64: Final = (1 << 64) - 1
EOI_OFFSET: Final = 0xB0
UNKNOWN_KEPT: Final = 256  # MSRs that do not exist, and were asked for

ARCH_CAPABILITIES: Final = ArchCapabilities(
    RDCL_NO=1, IBRS_ALL=1, SKIP_L1DFL_VMENTRY=1, SSB_NO=1, MDS_NO=1, IF_PSCHANGE_MC_NO=1, TAA_NO=1,
    SBDR_SSDP_NO=1, FBSDP_NO=1, PSDP_NO=1, BHI_NO=1, PBRSB_NO=1, GDS_NO=1, RFDS_NO=1, ITS_NO=1,
)  # fmt: skip

CONSTANTS: Final[dict[int, int]] = {
    Msr.IA32_PLATFORM_ID: 0,
    Msr.SMI_COUNT: 0,
    Msr.IA32_FEATURE_CONTROL: 1,  # locked, without VMX
    Msr.PLATFORM_INFO: 10 << 8,  # 10 * 100 MHz
    Msr.IA32_MTRRCAP: 1 << 10 | 1 << 8 | 8,  # WC, fixed ranges, 8 variable ranges
    Msr.IA32_ARCH_CAPABILITIES: int(ARCH_CAPABILITIES),
    Msr.IA32_MCG_CAP: 0,  # no machine-check banks
    Msr.LASTBRANCHFROMIP: 0,
    Msr.LASTBRANCHTOIP: 0,
    Msr.LASTINTFROMIP: 0,
    Msr.LASTINTTOIP: 0,
}
"""Read-only MSRs."""

SPEC_CTRL_BITS: Final = int(SpecCtrl(BHI_DIS_S=1, IBRS=1, STIBP=1))
NO_BHI_CTRL: Final = int(SpecCtrl(IBRS=1, STIBP=1))
MTRR_TYPES: Final = frozenset({0, 1, 4, 5, 6})
WRITE_BACK: Final = 6
MISC_ENABLE_RESET: Final = int(MiscEnable(PEBS_UNAVAILABLE=1, BTS_UNAVAILABLE=1, FAST_STRINGS=1))
MISC_ENABLE_FIXED: Final = int(MiscEnable(PEBS_UNAVAILABLE=1, BTS_UNAVAILABLE=1, PERFMON=1))
MISC_ENABLE_BITS: Final = sum(bit.mask for bit in MiscEnable.FIELDS)

_PHYS = range(Msr.IA32_MTRR_PHYSBASE0, Msr.IA32_MTRR_PHYSMASK7 + 1)
_FIXED = (
    Msr.IA32_MTRR_FIX64K_00000,
    Msr.IA32_MTRR_FIX16K_80000,
    Msr.IA32_MTRR_FIX16K_A0000,
    *range(Msr.IA32_MTRR_FIX4K_C0000, Msr.IA32_MTRR_FIX4K_F8000 + 1),
)


def reset_values(model: CpuModel) -> dict[int, int]:
    """The MSRs that are kept, with the values that firmware would leave."""
    physical_bits = model.physical_bits
    perfmon = MiscEnable.PERFMON.mask if "pmu" in model.shown else 0
    values = dict.fromkeys([*_PHYS, *_FIXED], 0)
    values |= dict.fromkeys(_FIXED, 0x0606_0606_0606_0606)
    # All memory is write-back but the gigabyte below 4 GiB, where devices are.
    values[Msr.IA32_MTRR_PHYSBASE0] = 0xC000_0000
    values[Msr.IA32_MTRR_PHYSBASE0 + 1] = (1 << physical_bits) - 0x4000_0000 | 1 << 11
    return values | {
        Msr.IA32_MTRR_DEF_TYPE: 1 << 11 | 1 << 10 | WRITE_BACK,
        Msr.IA32_SPEC_CTRL: 0,
        Msr.IA32_BIOS_SIGN_ID: 0x2B00_0600 << 32,
        Msr.MISC_FEATURES_ENABLES: 0,
        Msr.IA32_MCG_STATUS: 0,
        Msr.IA32_XSS: 0,
        Msr.IA32_MISC_ENABLE: MISC_ENABLE_RESET | perfmon,
        Msr.IA32_TSC_ADJUST: 0,
    }


@dataclass
class MsrState:
    """What a snapshot keeps."""

    values: dict[int, U64] = field(default_factory=dict)
    unknown: Counter[int] = field(default_factory=Counter)  # how often a guest asked for none


class Msrs(Part):
    """The MSRs of one vCPU."""

    state: MsrState

    def __init__(
        self, guest: Guest, apic: LocalApic, clock: GuestClock, model: CpuModel,
        look: Callable[[], None],
    ) -> None:  # fmt: skip
        """`look` is called when something has changed that the run loop must see."""
        self.guest, self.apic, self.clock, self.model = guest, apic, clock, model
        self.look, self.now = look, clock.now
        self.efer_allowed_changed: Callable[[], None] = lambda: None
        self.state = MsrState(reset_values(model))
        self.extra: dict[int, tuple[Callable[[], int], Callable[[int], None]]] = {}
        self.apic_page = 0
        self.hidden = model.hidden_msrs
        self.lacks_x2apic = Msr.X2APIC_EOI in self.hidden
        self.debugctl = int(DebugCtl(BTF=1, LBR=1))
        self.pmu: Pmu | None = None
        self.spec_ctrl = SPEC_CTRL_BITS if "bhi_ctrl" in model.shown else NO_BHI_CTRL
        self.eoi: Callable[[int], None] = lambda vector: None  # to the I/O APICs
        self.interrupt_command: Callable[[int], None] = lambda icr: None
        self.settle: Callable[[], None] = lambda: None  # before the guest sees its APIC
        self.note_apic_base()

    def as_firmware_leaves_them(self) -> None:
        """Their values when a kernel starts."""
        self.state.values = reset_values(self.model)
        if self.pmu is not None:
            self.pmu.reset()
        self.note_apic_base()
        self.note_tsc_offset()
        if self.model.apic_id == 0:  # the others wait, as after INIT
            self.set_virtual_wire()

    def load(self, saved: dict[str, Any]) -> None:
        """The APIC and the clock are restored already: they say where its page is now."""
        super().load(saved)
        self.note_apic_base()
        self.note_tsc_offset()

    # --- RDMSR and WRMSR: KeyError is #GP(0) ---

    def read(self, index: int) -> int:
        """RDMSR."""
        if index in self.hidden:
            self._no_such(index)
            raise KeyError(index)
        if 0x800 <= index <= 0x8FF or index == Msr.IA32_APIC_BASE:
            self.settle()
            return self.apic.rdmsr(index, self.now())
        if (value := self.state.values.get(index)) is not None:
            return value
        if (value := CONSTANTS.get(index)) is not None:
            return value
        if (pair := self.extra.get(index)) is not None:
            return pair[0]()
        match index:
            case Msr.IA32_TSC:
                return self._tsc()
            case Msr.IA32_TSC_DEADLINE:
                deadline = self.apic.rdmsr(index, self.now())
                return deadline + self._tsc_ahead() & MASK64 if deadline else 0
            case Msr.IA32_DEBUGCTL:
                return self.guest.debugctl
        self._no_such(index)
        raise KeyError(index)

    def write(self, index: int, value: int) -> None:
        """WRMSR."""
        if index in self.hidden:
            self._no_such(index)
            raise KeyError(index)
        if index == Msr.IA32_TSC_DEADLINE:
            deadline = value - self._tsc_ahead() & MASK64 if value else 0
            self.apic.wrmsr(index, deadline, self.now())
            self.look()
        elif 0x800 <= index <= 0x8FF or index == Msr.IA32_APIC_BASE:
            self._write_apic_msr(index, value)
        elif index in self.state.values:
            self.state.values[index] = self._checked(index, value)
            if index == Msr.IA32_MISC_ENABLE:
                self._note_features()
        elif (pair := self.extra.get(index)) is not None:
            pair[1](value)
        else:
            self._write_special(index, value)

    def _write_special(self, index: int, value: int) -> None:
        match index:
            case Msr.IA32_TSC:
                self._set_adjust(self.state.values[Msr.IA32_TSC_ADJUST] + value - self._tsc())
            case Msr.IA32_PRED_CMD if not value & ~1:
                pass  # a barrier for predictors that this processor does not have
            case Msr.IA32_DEBUGCTL if not value & ~self.debugctl:
                self.guest.debugctl = value & ~DebugCtl.LBR.mask
            case _:
                self._no_such(index)
                raise KeyError(index)

    def _checked(self, index: int, value: int) -> int:
        """The value to keep; KeyError if it sets reserved bits."""
        ok = True
        match index:
            case Msr.IA32_SPEC_CTRL:
                ok = not value & ~self.spec_ctrl
            case Msr.IA32_MISC_ENABLE:
                ok = not value & ~MISC_ENABLE_BITS
                value = value & ~MISC_ENABLE_FIXED | self.state.values[index] & MISC_ENABLE_FIXED
            case Msr.MISC_FEATURES_ENABLES | Msr.IA32_XSS:  # no component is a supervisor's
                ok = value == 0
            case Msr.IA32_MCG_STATUS:
                ok = not value & ~7
            case Msr.IA32_MTRR_DEF_TYPE:
                ok = not value & ~0xCFF and value & 0xFF in MTRR_TYPES
            case Msr.IA32_BIOS_SIGN_ID:
                value = self.state.values[index]  # writes trigger nothing, the revision stays
            case Msr.IA32_TSC_ADJUST:
                self._set_adjust(value)
            case _ if index in _PHYS:
                reserved = MASK64 << self.model.physical_bits & MASK64
                reserved |= 0x7FF if index & 1 else 0xF00
                ok = not value & reserved and (index & 1 or value & 0xFF in MTRR_TYPES) != 0
            case _:  # the fixed-range MTRRs
                ok = all(byte in MTRR_TYPES for byte in value.to_bytes(8, "little"))
        if not ok:
            raise KeyError(index)
        return value & MASK64

    def _no_such(self, index: int) -> None:
        unknown = self.state.unknown
        if len(unknown) < UNKNOWN_KEPT or index in unknown:
            unknown[index] += 1

    # --- performance monitoring ---

    def offer(self, pmu: Pmu) -> None:
        """These counters, if the CPU model shows them."""
        if "pmu" not in self.model.shown:
            return
        self.pmu = pmu
        self.debugctl |= int(DebugCtl(FREEZE_PERFMON_ON_PMI=1, FREEZE_LBRS_ON_PMI=1))
        for index in (*PERFMON_MSRS, *FULL_WIDTH_MSRS):
            self.extra[index] = partial(pmu.read, index), partial(pmu.write, index)

    # --- the TSC ---

    def _tsc_ahead(self) -> int:
        """How far the guest has set its TSC ahead of guest time."""
        return self.state.values[Msr.IA32_TSC_ADJUST]

    def _tsc(self) -> int:
        return self.now() + self._tsc_ahead() & MASK64

    def _set_adjust(self, value: int) -> None:
        self.state.values[Msr.IA32_TSC_ADJUST] = value & MASK64
        self.note_tsc_offset()

    def note_tsc_offset(self) -> None:
        """Tell the processor how far the guest's TSC is ahead of its own."""
        self.guest.set_tsc_offset(self.clock.offset + self._tsc_ahead() & MASK64)

    # --- the local APIC, by MSR and by its page ---

    def note_apic_base(self) -> None:
        """Look where the APIC's page is now; nowhere in x2APIC mode or while it is disabled."""
        base = ApicBase(self.apic.base)
        self.apic_page = base.ADDR if base.EN and not base.EXTD else 0
        self._note_features()

    def _note_features(self) -> None:
        """What CPUID shows follows these registers."""
        misc, allowed = MiscEnable(self.state.values[Msr.IA32_MISC_ENABLE]), self.model.efer_allowed
        self.model.follow(has_apic=bool(ApicBase(self.apic.base).EN), misc=misc)
        if self.model.efer_allowed != allowed:
            self.efer_allowed_changed()

    def set_virtual_wire(self) -> None:
        """Leave the APIC as firmware does: the 8259s come in through LINT0, NMIs through LINT1.

        SDM 3A, "Local APIC"; MultiProcessor Specification, "Virtual Wire Mode".
        """
        for offset, value in ((0xF0, 0x10F), (0x350, 0x700), (0x360, 0x400)):
            self.apic.write(offset, value, self.now())

    def is_apic_page(self, gpa: int) -> bool:
        """Whether the address is in the APIC's page."""
        return gpa >> 12 == self.apic_page != 0

    def _write_apic_msr(self, index: int, value: int) -> None:
        if index == Msr.IA32_APIC_BASE and value & ApicBase.EXTD.mask and self.lacks_x2apic:
            raise KeyError(index)
        self.settle()
        icr = self.apic.wrmsr(index, value, self.now())
        if index == Msr.X2APIC_EOI:
            self._ended()
            return
        self.look()
        if index == Msr.IA32_APIC_BASE:
            self.note_apic_base()
        if icr is not None:
            self.interrupt_command(icr)

    def apic_read(self, gpa: int, size: int) -> int:
        """A load from the APIC page: 32-bit registers, 16 bytes apart."""
        offset = gpa & 0xFFF
        self.settle()
        register = self.apic.read(offset & 0xFF0, self.now())
        return register >> 8 * (offset & 3) & (1 << 8 * size) - 1 if offset & 0xC == 0 else 0

    def apic_write(self, gpa: int, size: int, value: int) -> None:
        """A store to the APIC page."""
        offset = gpa & 0xFFF
        if size != 4 or offset & 0xF:
            return  # undefined on hardware; here it does nothing
        self.settle()
        icr = self.apic.write(offset, value, self.now())
        if offset == EOI_OFFSET:
            self._ended()
            return
        self.look()
        if icr is not None:
            self.interrupt_command(icr)

    def _ended(self) -> None:
        """The guest has ended an interrupt: go on with what that one kept back, if there is any."""
        if self.apic.pending() >= 0:
            self.look()
        self._broadcast_eoi()

    def _broadcast_eoi(self) -> None:
        for vector in self.apic.take_eois():
            self.eoi(vector)
