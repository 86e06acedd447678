"""A processor in VMX root operation: where every vCPU that is put onto it starts from.

Source: SDM 3C, "Enabling and Entering VMX Operation"; SDM 3A, "x2APIC Mode" and "Local Vector
Table", for the interrupt of a guest's counters.

Invariant: it belongs to the processor, not to a vCPU; the VMCS of each takes its host state.
"""

from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER, ApicBase, FeatureControl, Msr
from understudy.arch.vmx_controls import MissingControls, VmxBasic
from understudy.machine.host import Host
from understudy.silicon import Processor

SPURIOUS_ENABLED: Final = 0x1FF  # spurious vector and "APIC software enable"
PMU_VECTOR: Final = 0xFE
"""On which the processor's own APIC tells the hypervisor that a guest's counter has overflowed."""

IRR_OF_PMU: Final = Msr.X2APIC_IRR0 + PMU_VECTOR // 32
PMU_BIT: Final = 1 << PMU_VECTOR % 32


class Root:
    """One processor's VMXON region, and its own registers while no guest runs."""

    def __init__(self, host: Host, processor: Processor, *, has_pmu: bool) -> None:
        """`has_pmu`: guests have the processor's performance counters."""
        self.host, self.processor, self.has_pmu = host, processor, has_pmu
        self.region, self.table = host.each(2)
        self.revision = VmxBasic(processor.rdmsr(Msr.IA32_VMX_BASIC)).REVISION
        try:
            self.enter()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, host: Host, processor: Processor) -> "Root":
        """That of a processor which vCPUs share: entered once, and given back with the host."""
        root = host.entered.get(processor)
        if not isinstance(root, cls):
            root = host.entered[processor] = cls(host, processor, has_pmu=True)
        return root

    def frames(self) -> list[int]:
        """The host frames (pfn) of its structures."""
        return [self.region >> PAGE_SHIFT, self.table >> PAGE_SHIFT]

    def close(self) -> None:
        """The frames go back to the host.  The processor, which has them, must not run again."""
        for pfn in self.frames():
            self.host.release(pfn)

    def enter(self) -> None:
        """From outside VMX operation into root operation."""
        processor = self.processor
        control = FeatureControl(processor.rdmsr(Msr.IA32_FEATURE_CONTROL))
        if not control.LOCK:
            control = control.replace(LOCK=1, VMX_OUTSIDE_SMX=1)
            processor.wrmsr(Msr.IA32_FEATURE_CONTROL, int(control))
        if not control.VMX_OUTSIDE_SMX:
            raise MissingControls("the firmware has locked IA32_FEATURE_CONTROL without VMX")
        self.cr0 = int(CR0(processor.rdmsr(Msr.IA32_VMX_CR0_FIXED0)).replace(
            PG=1, WP=1, NE=1, ET=1, MP=1, PE=1))  # fmt: skip
        self.cr4_fixed = processor.rdmsr(Msr.IA32_VMX_CR4_FIXED0)
        self.cr4 = int(CR4(self.cr4_fixed).replace(VMXE=1, PAE=1, PGE=1, OSFXSR=1, OSXMMEXCPT=1))
        self.efer = int(EFER(NXE=1, LMA=1, LME=1, SCE=1))
        flat = {"cs": (0x08, 0xA09B), "ss": (0x10, 0xC093), "ds": (0x10, 0xC093),
                "es": (0x10, 0xC093), "fs": (0x10, 0xC093), "gs": (0x10, 0xC093)}  # fmt: skip
        state = {"cr0": self.cr0, "cr3": self.table, "cr4": self.cr4, "efer": self.efer}
        for name, (selector, attr) in flat.items():
            state |= {name: selector, f"{name}_base": 0, f"{name}_limit": 0xFFFF_FFFF}
            state[f"{name}_attr"] = attr
        state |= {"tr": 0x18, "tr_base": 0, "tr_limit": 0x67, "tr_attr": 0x8B}
        self.own = state  # in which VM entries find the processor, as each exit leaves it
        processor.set_registers(state)
        self.host.memory.write_u32(self.region, self.revision)
        processor.vmxon(self.region)
        if self.has_pmu:
            self._open_apic()

    def _open_apic(self) -> None:
        processor = self.processor
        base = ApicBase(processor.rdmsr(Msr.IA32_APIC_BASE)).replace(EN=1, EXTD=1)
        processor.wrmsr(Msr.IA32_APIC_BASE, int(base))
        processor.wrmsr(Msr.X2APIC_SVR, SPURIOUS_ENABLED)
        processor.wrmsr(Msr.X2APIC_LVT_PC, PMU_VECTOR)

    def takes_pmu_interrupt(self) -> bool:
        """Whether one waits in the processor's APIC; it is taken then, as with RFLAGS.IF set."""
        if not self.has_pmu or not self.processor.rdmsr(IRR_OF_PMU) & PMU_BIT:
            return False
        self.processor.apic.accept()
        self.take_pmu_interrupt()
        return True

    def take_pmu_interrupt(self) -> None:
        """The exit has acknowledged it: end it, and let the next one come."""
        self.processor.wrmsr(Msr.X2APIC_EOI, 0)
        self.processor.wrmsr(Msr.X2APIC_LVT_PC, PMU_VECTOR)
