"""The controls and the host state of one VMCS.

Source: SDM 3C, "VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields",
"Host-State Area".  The fields are written in the manual's order.

Invariants: a control word differs from the capability MSRs in no bit; a VMCS is active on one
processor at most, that on which the vCPU is.
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.msr import Msr
from understudy.arch.vmcs import SEGMENTS, Vmcs
from understudy.arch.vmx_controls import (
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    VmxBasic,
    VmxMisc,
    allowed,
)
from understudy.execution.vmx.root import Root
from understudy.machine.host import Host

PASSED: Final = (
    Msr.IA32_SYSENTER_CS, Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP, Msr.IA32_PAT,
    Msr.IA32_EFER, Msr.IA32_STAR, Msr.IA32_LSTAR, Msr.IA32_CSTAR, Msr.IA32_FMASK,
    Msr.IA32_FS_BASE, Msr.IA32_GS_BASE, Msr.IA32_KERNEL_GS_BASE, Msr.IA32_TSC_AUX,
)  # fmt: skip
"""MSRs that the guest reads and writes without an exit."""

PLE_GAP, PLE_WINDOW = 128, 4096
"""In ticks of the TSC: between two PAUSEs of one loop, and of the whole loop.  Those of KVM."""


class Operation:
    """The VMCS of one vCPU, and its MSR bitmap."""

    def __init__(
        self, host: Host, root: Root, vpid: int, *, keep_timer: bool, has_pmu: bool
    ) -> None:
        """`keep_timer`: the preemption timer goes on counting over exits.

        `has_pmu`: the guest has the processor's performance counters.
        """
        self.host, self.vpid, self.keep_timer, self.has_pmu = host, vpid, keep_timer, has_pmu
        self.vmcs, self.bitmap = host.each(2)
        self.use(root)
        self.msr_basic = VmxBasic(self.processor.rdmsr(Msr.IA32_VMX_BASIC))
        self.timer_shift = VmxMisc(self.processor.rdmsr(Msr.IA32_VMX_MISC)).TIMER_RATE
        try:
            self.begin()
        except BaseException:  # a control that we need is missing
            self.close()
            raise

    def use(self, root: Root) -> None:
        """It is on this processor now."""
        self.root, self.processor = root, root.processor
        self.write = root.processor.vmwrite

    def frames(self) -> list[int]:
        """The host frames (pfn) of its structures."""
        return [self.vmcs >> PAGE_SHIFT, self.bitmap >> PAGE_SHIFT]

    def close(self) -> None:
        """The frames go back to the host.  The vCPU must not run again."""
        for pfn in self.frames():
            self.host.release(pfn)

    def begin(self) -> None:
        """In root operation: a current VMCS without a guest."""
        self.host.memory.write_u32(self.vmcs, self.msr_basic.REVISION)
        self.processor.vmclear(self.vmcs)
        self.processor.vmptrld(self.vmcs)
        self._execution_controls()
        self._exit_and_entry_controls()
        self._host_state()

    def _capability(self, true: Msr, plain: Msr) -> int:
        return self.processor.rdmsr(true if self.msr_basic.TRUE_CONTROLS else plain)

    def _execution_controls(self) -> None:
        """SDM 3C, "VM-Execution Control Fields"."""
        pin = allowed(
            PinControls(ACTIVATE_PREEMPTION_TIMER=1, NMI_EXITING=1, EXTERNAL_INTERRUPT_EXITING=1),
            PinControls(VIRTUAL_NMIS=1),
            self._capability(Msr.IA32_VMX_TRUE_PINBASED_CTLS, Msr.IA32_VMX_PINBASED_CTLS),
        )
        self.virtual_nmis = pin.VIRTUAL_NMIS
        write = self.write
        write(Vmcs.PIN_CONTROLS, int(pin))
        for field in (Vmcs.EXCEPTION_BITMAP, Vmcs.PAGE_FAULT_ERROR_CODE_MASK,
                      Vmcs.PAGE_FAULT_ERROR_CODE_MATCH, Vmcs.CR3_TARGET_COUNT,
                      Vmcs.TSC_OFFSET):  # fmt: skip
            write(field, 0)
        self.host.memory.fill(self.bitmap, PAGE, 0xFF)
        for msr in PASSED:
            self.intercept(msr, False)
        write(Vmcs.MSR_BITMAPS, self.bitmap)
        write(Vmcs.VPID, self.vpid)

    def choose_exits(
        self,
        primary: PrimaryControls,
        secondary: SecondaryControls,
        optional: SecondaryControls,
    ) -> int:
        """Ask for these exits beside those of every guest.  Returns the primary controls.

        `optional`: what a processor can do without that does not have it.
        """
        wanted = PrimaryControls(
            ACTIVATE_SECONDARY_CONTROLS=1, MONITOR_EXITING=1, USE_MSR_BITMAPS=1,
            UNCONDITIONAL_IO_EXITING=1, CR8_STORE_EXITING=1, CR8_LOAD_EXITING=1,
            RDPMC_EXITING=int(not self.has_pmu), MWAIT_EXITING=1, HLT_EXITING=1,
            USE_TSC_OFFSETTING=1,
        )  # fmt: skip
        chosen = int(allowed(
            PrimaryControls(wanted | primary),
            PrimaryControls(0),
            self._capability(Msr.IA32_VMX_TRUE_PROCBASED_CTLS, Msr.IA32_VMX_PROCBASED_CTLS),
        ))  # fmt: skip
        second = allowed(
            SecondaryControls(secondary | SecondaryControls(ENABLE_VPID=1)),
            optional,
            self.processor.rdmsr(Msr.IA32_VMX_PROCBASED_CTLS2),
        )
        self.write(Vmcs.PRIMARY_CONTROLS, chosen)
        self.write(Vmcs.SECONDARY_CONTROLS, int(second))
        if second.PAUSE_LOOP_EXITING:
            self.write(Vmcs.PLE_GAP, PLE_GAP)
            self.write(Vmcs.PLE_WINDOW, PLE_WINDOW)
        if second.ENABLE_XSAVES:
            self.write(Vmcs.XSS_EXITING_BITMAP, 0)
        return chosen

    def intercept(self, msr: int, exits: bool) -> None:
        """Whether RDMSR and WRMSR of this MSR exit."""
        memory = self.host.memory
        half, bit = 0 if msr < 0x2000 else 1024, 1 << msr % 8
        for part in (0, 2048):
            at = self.bitmap + part + half + (msr & 0x1FFF) // 8
            old = memory.read(at, 1)[0]
            memory.write(at, bytes([old | bit if exits else old & ~bit]))

    def _exit_and_entry_controls(self) -> None:
        """SDM 3C, "VM-Exit Control Fields" and "VM-Entry Control Fields"."""
        pmu = int(self.has_pmu)
        exits = allowed(
            ExitControls(LOAD_EFER=1, SAVE_EFER=1, LOAD_PAT=1, SAVE_PAT=1,
                         HOST_ADDRESS_SPACE_SIZE=1, SAVE_DEBUG_CONTROLS=1,
                         LOAD_PERF_GLOBAL_CTRL=pmu, ACKNOWLEDGE_INTERRUPT_ON_EXIT=pmu,
                         SAVE_PREEMPTION_TIMER=int(self.keep_timer)),
            ExitControls(0),
            self._capability(Msr.IA32_VMX_TRUE_EXIT_CTLS, Msr.IA32_VMX_EXIT_CTLS),
        )  # fmt: skip
        entries = allowed(
            EntryControls(
                LOAD_EFER=1, LOAD_PAT=1, LOAD_PERF_GLOBAL_CTRL=pmu, LOAD_DEBUG_CONTROLS=1
            ),
            EntryControls(0),
            self._capability(Msr.IA32_VMX_TRUE_ENTRY_CTLS, Msr.IA32_VMX_ENTRY_CTLS),
        )
        self.write(Vmcs.EXIT_CONTROLS, int(exits))
        self.write(Vmcs.ENTRY_CONTROLS, int(entries))
        for field in (Vmcs.EXIT_MSR_STORE_COUNT, Vmcs.EXIT_MSR_LOAD_COUNT,
                      Vmcs.ENTRY_MSR_LOAD_COUNT, Vmcs.ENTRY_INTERRUPTION_INFORMATION):  # fmt: skip
            self.write(field, 0)

    def _host_state(self) -> None:
        """SDM 3C, "Host-State Area".  The host software is Python: RIP and RSP are never used."""
        write = self.write
        write(Vmcs.HOST_CR0, self.root.cr0)
        write(Vmcs.HOST_CR3, self.root.table)
        write(Vmcs.HOST_CR4, self.root.cr4)
        write(Vmcs.HOST_EFER, self.root.efer)
        write(Vmcs.HOST_PERF_GLOBAL_CTRL, 0)  # the counters are the guest's alone
        write(Vmcs.HOST_PAT, self.processor.rdmsr(Msr.IA32_PAT))
        write(Vmcs.HOST_CS, 0x08)
        write(Vmcs.HOST_TR, 0x18)
        for name in SEGMENTS:
            if name not in ("cs", "tr", "ldtr"):
                write(Vmcs[f"HOST_{name.upper()}"], 0x10)
        for name in ("FS_BASE", "GS_BASE", "TR_BASE", "GDTR_BASE", "IDTR_BASE", "SYSENTER_CS",
                     "SYSENTER_ESP", "SYSENTER_EIP", "RSP", "RIP"):  # fmt: skip
            write(Vmcs[f"HOST_{name}"], 0)
