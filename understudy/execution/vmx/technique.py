"""Execution in VMX non-root operation: the guest runs by itself until a VM exit.

Source: lecture, "Hardware support: Intel VT-x"; SDM 3C, "VM Entries", "Event Injection".

What does not exit: RDTSC, CLTS, the MSRs in `operation.PASSED`, and with EPT CR3 loads, INVLPG and
page faults.  What depends on the paging technique is in `control_registers`.

Invariants: the guest sees neither CR4.VMXE nor CR0.NE's fixed value (read shadows); on entry the
interruption-information field is valid only if `inject` was called since the last exit.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Final

from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.msr import Msr
from understudy.arch.segment import SegmentName
from understudy.arch.vmcs import Interruptibility, InterruptionInformation, Vmcs
from understudy.arch.vmx_controls import PrimaryControls, SecondaryControls
from understudy.execution import Execution
from understudy.execution.vmx.control_registers import (
    ControlRegisters,
    InHypervisor,
    InProcessor,
)
from understudy.execution.vmx.exits import PUT_OFF, TABLE
from understudy.execution.vmx.fields import KEPT
from understudy.execution.vmx.guest_state import (
    CODE64,
    CS_RIGHTS,
    GUEST_CR3,
    RFLAGS_FIELD,
    RIP,
    GuestState,
)
from understudy.execution.vmx.operation import Operation
from understudy.execution.vmx.optional_exits import OPTIONAL, controls
from understudy.execution.vmx.placement import ONE_ADDRESS, ONE_CONTEXT
from understudy.execution.vmx.root import Root
from understudy.guest import Control, Event
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.silicon import Exit, Processor
from understudy.state import plain, restore
from understudy.vcpu.cpu_model import CpuModel

MASK64: Final = (1 << 64) - 1
INTERRUPTIBILITY: Final = int(Vmcs.GUEST_INTERRUPTIBILITY_STATE)
PENDING_DEBUG: Final = int(Vmcs.GUEST_PENDING_DEBUG_EXCEPTIONS)
DEBUGCTL: Final = int(Vmcs.GUEST_DEBUGCTL)
RPL: Final = 3  # of a selector
CODE, CONFORMING, UNUSABLE = 1 << 3, 0xC, 1 << 16  # of access rights
INFO: Final = int(Vmcs.ENTRY_INTERRUPTION_INFORMATION)
IF: Final = RFLAGS.IF.mask
TF: Final = RFLAGS.TF.mask
RF: Final = RFLAGS.RF.mask
RF_AND_TF: Final = RF | TF
PE: Final = CR0.PE.mask
REAL_MODE: Final = 0  # a CR0
SHADOW: Final = int(Interruptibility(MOV_SS=1, STI=1))
NMI_BLOCKED: Final = int(Interruptibility(NMI=1, MOV_SS=1, STI=1))
SINGLE_STEP: Final = 1 << 14  # BS, in the pending debug exceptions
TRAPS: Final = SINGLE_STEP | 1 << 12  # that, and enabled breakpoints
BTF: Final = 1 << 1  # of IA32_DEBUGCTL: a single step ends with a branch
ERROR_CODE: Final = InterruptionInformation.ERROR_CODE.mask
VALID: Final = InterruptionInformation.VALID.mask
TYPE_SHIFT: Final = InterruptionInformation.TYPE.low
PRESENT: Final = 1
ADDRESS: Final = 0xF_FFFF_FFFF_F000
WINDOWS: Final = int(PrimaryControls(INTERRUPT_WINDOW_EXITING=1, NMI_WINDOW_EXITING=1))
"""Controls that `window` sets."""


class Vmx(GuestState, Execution, name="vmx"):
    """A vCPU on a processor in VMX operation."""

    put_off = PUT_OFF
    optional_exits: ClassVar[Mapping[str, str]] = {
        name: one.words for name, one in OPTIONAL.items()
    }

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        super().__init__(host, processor)
        self.asked = controls(exits)
        self.model, self.table = model, dict(TABLE)
        has_pmu = "pmu" in model.shown
        self.has_vmcs = before is None
        if before is not None:
            assert isinstance(before, Vmx)
            self.operation, self.power_on_fx = before.operation, before.power_on_fx
            self.timer_shift = self.operation.timer_shift
            self.view = paging.attach(self)
            return
        with ExitStack() as given:
            if processor is None:
                given.callback(self.leave_desk)
                root = Root.of(host, self.processor)
            else:
                root = Root(host, processor, has_pmu=has_pmu)
                given.callback(root.close)
            self.operation = Operation(
                host, root, self.vpid, keep_timer=keep_timer, has_pmu=has_pmu
            )
            given.callback(self.operation.close)
            self.timer_shift = self.operation.timer_shift
            self.view = paging.attach(self)
            given.pop_all()
        self._follow_view()
        self.resume = self.launch

    def take_over(self, before: Execution) -> None:
        """The VMCS is the same, and what is in the processor stays there."""
        assert isinstance(before, Vmx)
        values, processor = before.control(), self.processor
        before.rest()
        before.has_vmcs, self.has_vmcs = False, True
        processor.vmclear(self.operation.vmcs)
        processor.vmptrld(self.operation.vmcs)
        self._follow_view()
        self.resume = self.launch
        self.load_control(values)
        self.view.mode_change()
        processor.flush()
        self.after_skip, self.thread = before.after_skip, before.thread

    def rest(self) -> None:
        """Have all of the guest where VMX keeps it, and the processor as VMX has it."""

    def take_pmu_interrupt(self) -> None:
        self.operation.root.take_pmu_interrupt()

    @classmethod
    def cr4_available(cls, processor: Processor) -> int:
        return processor.rdmsr(Msr.IA32_VMX_CR4_FIXED1)

    def frames(self) -> list[int]:
        own = self.operation.root.frames() if self.is_at_home else []
        return own + self.operation.frames()

    def close(self) -> None:
        if not self.has_vmcs:
            return
        if self.is_at_home:
            self.operation.root.close()
        else:
            self.take_off()
            self.host.vpids.free(self.vpid)
        self.operation.close()

    def _follow_view(self) -> None:
        """Whether there is an EPT decides where control registers are kept, and what exits."""
        kind, operation = InProcessor if self.view.eptp else InHypervisor, self.operation
        self.kept: ControlRegisters = kind(
            self.read, self.write, operation.intercept, self.view, self.model,
            operation.root.cr4_fixed,
        )  # fmt: skip
        self._choose_exits()

    def load_control(self, values: Control) -> None:
        if self.view.adapt(values.cr0):
            self._follow_view()
            self.processor.flush()
            self._last = None  # it may have been elsewhere
            self.notify()  # which windows are open is to be chosen again
        self.kept.load(values)

    def _choose_exits(self) -> None:
        kept, shown = self.kept, self.model.shown
        optional = SecondaryControls(  # what lets the guest have an instruction, or not have it
            ENABLE_RDTSCP=int("rdtscp" in shown), ENABLE_INVPCID=int("invpcid" in shown),
            ENABLE_XSAVES=int("xsaves" in shown),
            PAUSE_LOOP_EXITING=int(self.host.spins_exit and self.model.topology.count > 1),
            RDRAND_EXITING=int("rdrand" not in shown), RDSEED_EXITING=int("rdseed" not in shown),
        )  # fmt: skip
        primary, secondary = self.asked
        self.primary = self.operation.choose_exits(
            PrimaryControls(kept.primary | primary), SecondaryControls(kept.secondary | secondary),
            optional,
        )  # fmt: skip
        self.current_primary = self.primary
        self.operation.intercept(Msr.IA32_PKRS, "pks" not in shown)

    def use(self, paging: Paging) -> None:
        values = self.control()
        self.view = paging.attach(self)
        self._follow_view()
        self.load_control(values)
        self.view.mode_change()
        self.processor.flush()
        self._last = None  # it may have been elsewhere

    def set_registers(self, values: dict[str, int]) -> None:
        super().set_registers(values)
        self.view.mode_change()
        self.write(Vmcs.VMCS_LINK_POINTER, MASK64)
        for field in (INTERRUPTIBILITY, int(Vmcs.GUEST_ACTIVITY_STATE), PENDING_DEBUG, INFO):
            self.write(field, 0)

    def reset(self) -> None:
        super().reset()
        self.window(False, False)
        self.write(Vmcs.ENTRY_EXCEPTION_ERROR_CODE, 0)
        self.arm(0)

    # --- entering ---

    def skip(self, length: int) -> None:
        read, write = self.read, self.write
        rip = read(RIP)
        after = rip + length
        if (rip ^ after) >> 32:
            after &= MASK64 if read(CS_RIGHTS) & CODE64 else 0xFFFF_FFFF
        write(RIP, after)
        if shadow := read(INTERRUPTIBILITY) & SHADOW:
            write(INTERRUPTIBILITY, read(INTERRUPTIBILITY) ^ shadow)
        if (flags := read(RFLAGS_FIELD)) & RF_AND_TF:
            if flags & RF:  # it lasts for one instruction
                write(RFLAGS_FIELD, flags ^ RF)
            if flags & TF:
                trap = 0 if read(DEBUGCTL) & BTF else SINGLE_STEP
                write(PENDING_DEBUG, read(PENDING_DEBUG) & ~SINGLE_STEP | trap)
        if length and self.after_skip is not None:  # else it is not done yet
            self.after_skip()

    def has_debug_trap(self) -> bool:
        return bool(self.read(PENDING_DEBUG) & TRAPS)

    def end_shadow(self) -> None:
        self.write(INTERRUPTIBILITY, self.read(INTERRUPTIBILITY) & ~SHADOW)
        self.write(PENDING_DEBUG, 0)

    def bend(self) -> bool:
        """What only an unrestricted guest may be (SDM 3C, "Checks on Guest Segment Registers").

        Decisions 0035 and 0054: SYSCALL takes RPL of SS from IA32_STAR; real-address mode leaves
        any selectors, and a CS of data.
        """
        cpl, is_bent = self.cpl(), False
        for n in range(SegmentName.LDTR):
            old = self.segment(n)
            rpl, rights = old.selector & RPL, old.rights
            if n == SegmentName.CS:
                rights |= CODE
            if n in (SegmentName.CS, SegmentName.SS):
                rpl = cpl
            elif not rights & UNUSABLE and rights & CONFORMING != CONFORMING:
                rpl = min(rpl, rights >> 5 & RPL)
            new = old._replace(selector=old.selector & ~RPL | rpl, rights=rights)
            if new != old:
                self.set_segment(n, new)
                is_bent = True
        return is_bent

    @property
    def is_inside(self) -> bool:
        processor = self._processor
        return processor is not None and processor.in_guest

    def run(self, budget: int) -> Exit:
        return self.processor.run(budget)

    def kick(self) -> None:
        processor = self._processor
        if processor is not None:
            processor.kick()

    def inject(self, event: Event) -> None:
        vector, kind, error, length = event
        info = VALID | kind << TYPE_SHIFT | vector
        # Real mode pushes no error codes.
        if error is not None and self.read(Vmcs.GUEST_CR0) & PE:
            info |= ERROR_CODE
            self.write(Vmcs.ENTRY_EXCEPTION_ERROR_CODE, error)
        if length:
            self.write(Vmcs.ENTRY_INSTRUCTION_LENGTH, length)
        self.write(INFO, info)

    def window(self, interrupts: bool, nmis: bool) -> None:
        controls = self.primary
        if interrupts:
            controls |= PrimaryControls.INTERRUPT_WINDOW_EXITING.mask
        if nmis and self.operation.virtual_nmis:
            controls |= PrimaryControls.NMI_WINDOW_EXITING.mask
        if controls != self.current_primary:
            self.current_primary = controls
            self.write(Vmcs.PRIMARY_CONTROLS, controls)

    def single_step(self, on: bool) -> None:
        """Whether to exit after one instruction (SDM 3C, "Monitor Trap Flag")."""
        flag = PrimaryControls.MONITOR_TRAP_FLAG.mask
        self.primary = self.primary | flag if on else self.primary & ~flag
        controls = self.current_primary
        self.current_primary = controls | flag if on else controls & ~flag
        self.write(Vmcs.PRIMARY_CONTROLS, self.current_primary)

    def takes_interrupts(self) -> bool:
        read = self.read
        is_open = read(RFLAGS_FIELD) & IF and not read(INTERRUPTIBILITY) & SHADOW
        return bool(is_open) and not read(PENDING_DEBUG) & TRAPS

    def takes_nmis(self) -> bool:
        return not (self.read(INTERRUPTIBILITY) & NMI_BLOCKED or self.read(PENDING_DEBUG) & TRAPS)

    def block_nmis(self) -> None:
        """An IRET that unblocked NMIs did not complete."""
        self.write(INTERRUPTIBILITY, self.read(INTERRUPTIBILITY) | Interruptibility.NMI.mask)

    def unblock_nmis(self) -> None:
        """An NMI that is to be delivered again must find NMIs unblocked."""
        self.write(INTERRUPTIBILITY, self.read(INTERRUPTIBILITY) & ~Interruptibility.NMI.mask)

    # --- time ---

    def set_tsc_offset(self, offset: int) -> None:
        self.write(Vmcs.TSC_OFFSET, offset & MASK64)

    # --- translations ---

    def load_root(self, hpa: int) -> None:
        self.write(GUEST_CR3, hpa)

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        read = self.read
        return self.save_place() | {
            "fields": {name: read(field) for name, field in KEPT.items()},
            "control": plain(self.control()),
            "windows": self.current_primary & WINDOWS,
            "has_ept": self.view.eptp != 0,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """The VMCS is made anew: of a snapshot it holds guest registers and nothing else."""
        self.load_place(saved, restore(int, saved["retired"], "retired"))
        self.operation.begin()
        if saved["has_ept"]:
            self.view.adapt(REAL_MODE)
        self._follow_view()
        self.resume = self.launch
        control: Control = restore(Control, saved["control"], "control")
        if len(control.pdptes) != 4:
            raise ValueError(f"snapshot: {len(control.pdptes)} PDPTEs, expected 4")
        self.kept.load(control)  # by EPT or not, as it was: it may never have been started
        self.write(Vmcs.VMCS_LINK_POINTER, MASK64)
        for name, field in KEPT.items():
            self.write(field, saved["fields"][name])
        self.current_primary = self.primary | saved["windows"] & WINDOWS
        self.write(Vmcs.PRIMARY_CONTROLS, self.current_primary)

    def code_at(self, gva: int, length: int) -> bytes:
        code = self.processor.fetch(gva, length)
        return code if len(code) == length else self.view.fetch(gva, length) or code

    def forget(self, addresses: Sequence[int] | None) -> None:
        processor = self.processor
        if processor.in_guest:
            processor.flush()
        elif self.view.eptp:
            processor.invept(ONE_CONTEXT, self.view.eptp)
        elif addresses is None:
            processor.invvpid(ONE_CONTEXT, self.vpid)
        else:
            for gva in addresses:
                processor.invvpid(ONE_ADDRESS, self.vpid, gva)

    def forget_guest(self) -> None:
        """What the guest's own tables have led to: it has loaded CR3 by a task switch."""
        self.processor.invvpid(ONE_CONTEXT, self.vpid)
