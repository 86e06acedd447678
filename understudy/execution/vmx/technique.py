"""Execution in VMX non-root operation: the guest runs by itself until a VM exit.

Source: lecture, "Hardware support: Intel VT-x"; SDM 3C, "Virtual Machine Control Structures" and
"VM Entries".  The fields are written in the manual's order: execution controls, exit controls,
entry controls, host state, guest state.

What does not exit: RDTSC, CLTS, the MSRs in `PASSED`, and with EPT CR3 loads, INVLPG and page
faults.  MSRs that the VMCS does not hold (STAR and its kin) stay in the processor, which belongs
to this vCPU alone.  What depends on the paging technique is in `control_registers`.

Invariants: a control word differs from the capability MSRs in no bit; the guest sees neither
CR4.VMXE nor CR0.NE's fixed value (read shadows); on entry the interruption-information field is
valid only if `inject` was called since the last exit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.msr import EFER, FeatureControl, Msr
from understudy.arch.vmcs import (
    SEGMENTS,
    AccessRights,
    Interruptibility,
    InterruptionInformation,
    Vmcs,
)
from understudy.arch.vmx_controls import (
    EntryControls,
    ExitControls,
    MissingControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    VmxBasic,
    VmxMisc,
    allowed,
)
from understudy.execution import Execution
from understudy.execution.vmx.control_registers import (
    FIXED,
    ControlRegisters,
    InHypervisor,
    InProcessor,
)
from understudy.execution.vmx.exits import TABLE
from understudy.execution.vmx.fields import (
    BY_CONTROL,
    KEPT,
    MSR_NAMES,
    REGISTER_FIELDS,
    with_defaults,
)
from understudy.guest import (
    RSP,
    Control,
    Event,
    Segment,
    TableRegister,
    UnsupportedMode,
)
from understudy.machine.frames import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.silicon import Exit, Processor

if TYPE_CHECKING:
    from understudy.vcpu.cpu_model import CpuModel

PASSED: Final = (
    Msr.IA32_SYSENTER_CS, Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP, Msr.IA32_PAT,
    Msr.IA32_EFER, Msr.IA32_STAR, Msr.IA32_LSTAR, Msr.IA32_CSTAR, Msr.IA32_FMASK,
    Msr.IA32_FS_BASE, Msr.IA32_GS_BASE, Msr.IA32_KERNEL_GS_BASE, Msr.IA32_TSC_AUX,
)  # fmt: skip
"""MSRs that the guest reads and writes without an exit."""

VPID: Final = 1  # there is one vCPU to a processor
MASK64: Final = (1 << 64) - 1
RIP: Final = int(Vmcs.GUEST_RIP)
RFLAGS_FIELD: Final = int(Vmcs.GUEST_RFLAGS)
INTERRUPTIBILITY: Final = int(Vmcs.GUEST_INTERRUPTIBILITY_STATE)
PENDING_DEBUG: Final = int(Vmcs.GUEST_PENDING_DEBUG_EXCEPTIONS)
TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
INFO: Final = int(Vmcs.ENTRY_INTERRUPTION_INFORMATION)
IF: Final = RFLAGS.IF.mask
TF: Final = RFLAGS.TF.mask
RF: Final = RFLAGS.RF.mask
SHADOW: Final = int(Interruptibility(MOV_SS=1, STI=1))
NMI_BLOCKED: Final = int(Interruptibility(NMI=1, MOV_SS=1, STI=1))
SINGLE_STEP: Final = 1 << 14  # BS, in the pending debug exceptions
ERROR_CODE: Final = InterruptionInformation.ERROR_CODE.mask
VALID: Final = InterruptionInformation.VALID.mask
TYPE_SHIFT: Final = InterruptionInformation.TYPE.low
PE: Final = CR0.PE.mask
GUEST_RSP: Final = int(Vmcs.GUEST_RSP)
GUEST_CR3: Final = int(Vmcs.GUEST_CR3)
SELECTOR, BASE = int(Vmcs.GUEST_ES), int(Vmcs.GUEST_ES_BASE)  # of ES; the next has two more
LIMIT, RIGHTS = int(Vmcs.GUEST_ES_LIMIT), int(Vmcs.GUEST_ES_ACCESS_RIGHTS)
CS_RIGHTS, SS_RIGHTS = int(Vmcs.GUEST_CS_ACCESS_RIGHTS), int(Vmcs.GUEST_SS_ACCESS_RIGHTS)
CODE64, CODE32 = AccessRights.L.mask, AccessRights.DB.mask
ONE_ADDRESS, ONE_CONTEXT = 0, 1  # types of INVVPID and INVEPT
PRESENT: Final = 1
ADDRESS: Final = 0xF_FFFF_FFFF_F000
WINDOWS: Final = int(PrimaryControls(INTERRUPT_WINDOW_EXITING=1, NMI_WINDOW_EXITING=1))
"""Controls that `window` sets."""


class Vmx(Execution, name="vmx"):
    """A vCPU on one processor in VMX operation."""

    cr0_always_exits = FIXED

    def __init__(
        self, host: Host, processor: Processor, paging: Paging, model: "CpuModel",
        *, keep_timer: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(host, processor, paging, model, keep_timer=keep_timer)
        self.table = dict(TABLE)
        self.read, self.write = processor.vmread, processor.vmwrite
        self.read_gpr, self.write_gpr = processor.gpr, processor.set_gpr
        self.region, self.vmcs, self.bitmap = host.frame(), host.frame(), host.frame()
        self.host_table = host.frame()
        self.msr_basic = VmxBasic(processor.rdmsr(Msr.IA32_VMX_BASIC))
        self.timer_shift = VmxMisc(processor.rdmsr(Msr.IA32_VMX_MISC)).TIMER_RATE
        self._enter_operation()
        self.kept = self._keep_control(paging)
        self._execution_controls()
        self._exit_and_entry_controls()
        self._host_state()
        self.resume = self._launch
        paging.attach(self)

    def frames(self) -> list[int]:
        hpas = (self.region, self.vmcs, self.bitmap, self.host_table)
        return [hpa >> PAGE_SHIFT for hpa in hpas]

    def close(self) -> None:
        """Leave VMX operation; the frames go back to the host."""
        if not self.processor.in_guest:
            self.processor.vmclear(self.vmcs)
            self.processor.vmxoff()
        for pfn in self.frames():
            self.host.release(pfn)

    def _keep_control(self, paging: Paging) -> ControlRegisters:
        kind = InProcessor if paging.eptp else InHypervisor
        return kind(self.read, self.write, self.intercept, paging, self.model, self.cr4_fixed)

    def use(self, paging: Paging) -> None:
        values = self.control()
        self.paging, self.kept = paging, self._keep_control(paging)
        self._choose_exits()
        paging.attach(self)
        self.load_control(values)
        paging.mode_change()
        self.processor.flush()

    # --- set-up ---

    def _enter_operation(self) -> None:
        """SDM 3C, "Enabling and Entering VMX Operation"."""
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
        state = {"cr0": self.cr0, "cr3": self.host_table, "cr4": self.cr4, "efer": self.efer}
        for name, (selector, attr) in flat.items():
            state |= {name: selector, f"{name}_base": 0, f"{name}_limit": 0xFFFF_FFFF}
            state[f"{name}_attr"] = attr
        state |= {"tr": 0x18, "tr_base": 0, "tr_limit": 0x67, "tr_attr": 0x8B}
        processor.set_registers(state)
        for region in (self.region, self.vmcs):
            self.host.memory.write_u32(region, self.msr_basic.REVISION)
        processor.vmxon(self.region)
        processor.vmclear(self.vmcs)
        processor.vmptrld(self.vmcs)

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
        self._choose_exits()
        for field in (Vmcs.EXCEPTION_BITMAP, Vmcs.PAGE_FAULT_ERROR_CODE_MASK,
                      Vmcs.PAGE_FAULT_ERROR_CODE_MATCH, Vmcs.CR3_TARGET_COUNT,
                      Vmcs.TSC_OFFSET):  # fmt: skip
            write(field, 0)
        self.host.memory.fill(self.bitmap, PAGE, 0xFF)
        for msr in PASSED:
            self.intercept(msr, False)
        write(Vmcs.MSR_BITMAPS, self.bitmap)
        write(Vmcs.VPID, VPID)

    def _choose_exits(self) -> None:
        """The controls that the paging technique has a say in."""
        wanted = PrimaryControls(
            ACTIVATE_SECONDARY_CONTROLS=1, MONITOR_EXITING=1, USE_MSR_BITMAPS=1,
            UNCONDITIONAL_IO_EXITING=1, CR8_STORE_EXITING=1, CR8_LOAD_EXITING=1,
            RDPMC_EXITING=1, MWAIT_EXITING=1, HLT_EXITING=1, USE_TSC_OFFSETTING=1,
        )  # fmt: skip
        self.primary = int(allowed(
            PrimaryControls(wanted | self.kept.primary),
            PrimaryControls(0),
            self._capability(Msr.IA32_VMX_TRUE_PROCBASED_CTLS, Msr.IA32_VMX_PROCBASED_CTLS),
        ))  # fmt: skip
        self.current_primary = self.primary
        secondary = allowed(
            SecondaryControls(self.kept.secondary | SecondaryControls(ENABLE_VPID=1)),
            SecondaryControls(
                ENABLE_RDTSCP=1, ENABLE_INVPCID=1, RDRAND_EXITING=1, RDSEED_EXITING=1
            ),
            self.processor.rdmsr(Msr.IA32_VMX_PROCBASED_CTLS2),
        )
        self.write(Vmcs.PRIMARY_CONTROLS, self.primary)
        self.write(Vmcs.SECONDARY_CONTROLS, int(secondary))

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
        exits = allowed(
            ExitControls(LOAD_EFER=1, SAVE_EFER=1, LOAD_PAT=1, SAVE_PAT=1,
                         HOST_ADDRESS_SPACE_SIZE=1, SAVE_DEBUG_CONTROLS=1,
                         SAVE_PREEMPTION_TIMER=int(self.keep_timer)),
            ExitControls(0),
            self._capability(Msr.IA32_VMX_TRUE_EXIT_CTLS, Msr.IA32_VMX_EXIT_CTLS),
        )  # fmt: skip
        entries = allowed(
            EntryControls(LOAD_EFER=1, LOAD_PAT=1, LOAD_DEBUG_CONTROLS=1),
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
        write(Vmcs.HOST_CR0, self.cr0)
        write(Vmcs.HOST_CR3, self.host_table)
        write(Vmcs.HOST_CR4, self.cr4)
        write(Vmcs.HOST_EFER, self.efer)
        write(Vmcs.HOST_PAT, self.processor.rdmsr(Msr.IA32_PAT))
        write(Vmcs.HOST_CS, 0x08)
        write(Vmcs.HOST_TR, 0x18)
        for name in SEGMENTS:
            if name not in ("cs", "tr", "ldtr"):
                write(Vmcs[f"HOST_{name.upper()}"], 0x10)
        for name in ("FS_BASE", "GS_BASE", "TR_BASE", "GDTR_BASE", "IDTR_BASE", "SYSENTER_CS",
                     "SYSENTER_ESP", "SYSENTER_EIP", "RSP", "RIP"):  # fmt: skip
            write(Vmcs[f"HOST_{name}"], 0)

    # --- the guest's registers ---

    def set_registers(self, values: dict[str, int]) -> None:
        """Set all of the guest's registers; those not named get the values of `with_defaults`."""
        state = with_defaults(values)
        gprs = list(self.processor.gprs())
        late = {}
        control = Control(state.pop("cr0"), state.pop("cr3"), state.pop("cr4"), state.pop("efer"))
        for name, value in state.items():
            if name in REGISTER_FIELDS:
                self.write(REGISTER_FIELDS[name], value)
            elif name in GPRS:
                gprs[GPRS.index(name)] = value
            elif name in MSR_NAMES:
                self.processor.wrmsr(MSR_NAMES[name], value)
            else:
                late[name] = value
        self.processor.set_gprs(tuple(gprs))
        self.load_control(control)
        self.paging.mode_change()
        self.processor.set_registers({name: late.pop(name) for name in LIVE & late.keys()})
        if unknown := late.keys() - {"cr8"}:
            raise KeyError(f"no such register: {', '.join(sorted(unknown))}")
        self.write(Vmcs.VMCS_LINK_POINTER, MASK64)
        for field in (INTERRUPTIBILITY, int(Vmcs.GUEST_ACTIVITY_STATE), PENDING_DEBUG, INFO):
            self.write(field, 0)

    def registers(self) -> dict[str, int]:
        if self.processor.in_guest:
            return self.processor.registers()
        live = self.processor.gprs()
        out = {name: live[n] for n, name in enumerate(GPRS)}
        out |= {name: self.read(field) for name, field in REGISTER_FIELDS.items()}
        out |= self.control()._asdict()
        del out["pdptes"]
        out |= {name: self.processor.rdmsr(index) for name, index in MSR_NAMES.items()}
        return out

    def gpr(self, n: int) -> int:
        return self.read(GUEST_RSP) if n == RSP else self.read_gpr(n)

    def set_gpr(self, n: int, value: int) -> None:
        if n == RSP:
            self.write(GUEST_RSP, value)
        else:
            self.write_gpr(n, value)

    @property
    def rip(self) -> int:
        return self.read(RIP)

    @rip.setter
    def rip(self, value: int) -> None:
        self.write(RIP, value)

    @property
    def rflags(self) -> int:
        return self.read(RFLAGS_FIELD)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.write(RFLAGS_FIELD, value)

    @property
    def dr7(self) -> int:
        return self.read(Vmcs.GUEST_DR7)

    @dr7.setter
    def dr7(self, value: int) -> None:
        self.write(Vmcs.GUEST_DR7, value)

    def add_dr6(self, bits: int) -> None:
        self.processor.set_registers({"dr6": self.processor.registers()["dr6"] | bits})

    def set_cr2(self, value: int) -> None:
        self.processor.set_registers({"cr2": value})

    @property
    def debugctl(self) -> int:
        return self.read(Vmcs.GUEST_DEBUGCTL)

    @debugctl.setter
    def debugctl(self, value: int) -> None:
        self.write(Vmcs.GUEST_DEBUGCTL, value)

    # --- modes and segments ---

    def segment(self, n: int) -> Segment:
        read, at = self.read, 2 * n
        return Segment(read(SELECTOR + at), read(BASE + at), read(LIMIT + at), read(RIGHTS + at))

    def set_segment(self, n: int, segment: Segment) -> None:
        for first, value in zip((SELECTOR, BASE, LIMIT, RIGHTS), segment, strict=True):
            self.write(first + 2 * n, value)

    def segment_base(self, n: int) -> int:
        return self.read(BASE + 2 * n)

    def gdtr(self) -> TableRegister:
        return TableRegister(self.read(Vmcs.GUEST_GDTR_BASE), self.read(Vmcs.GUEST_GDTR_LIMIT))

    def cpl(self) -> int:
        return self.read(SS_RIGHTS) >> 5 & 3

    def code_bits(self) -> int:
        rights = self.read(CS_RIGHTS)
        return 64 if rights & CODE64 else 32 if rights & CODE32 else 16

    def is_code64(self) -> bool:
        return bool(self.read(CS_RIGHTS) & CODE64)

    # --- control registers ---

    def control(self) -> Control:
        return self.kept.get()

    def paging_control(self) -> Control:
        return self.kept.paging_control()

    def real_control(self) -> Control:
        read = self.read
        return Control(
            read(Vmcs.GUEST_CR0), read(GUEST_CR3), read(Vmcs.GUEST_CR4), read(Vmcs.GUEST_EFER)
        )

    def load_control(self, values: Control) -> None:
        self.kept.load(values)

    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        assert isinstance(self.kept, InHypervisor)
        self.kept.note_cr3(cr3, pdptes)

    def check_mode(self, cr0: int, technique: str, *, has_ept: bool) -> None:
        """SDM 3C, "Unrestricted Guests"."""
        if not cr0 & PE and not has_ept:
            raise UnsupportedMode(
                "real-address mode (CR0.PE=0) needs EPT in VMX operation: "
                f"use paging ept, not {technique}"
            )

    # --- entering ---

    def _launch(self, budget: int) -> Exit:
        """The first entry is a VMLAUNCH, all others are VMRESUMEs."""
        exit = self.processor.vmlaunch(budget)
        if not exit.entry_failure:
            self.resume = self.processor.vmresume
        return exit

    def skip(self, length: int) -> None:
        read, write = self.read, self.write
        rip = read(RIP)
        after = rip + length
        if (rip ^ after) >> 32 and not read(CS_RIGHTS) & CODE64:
            after &= 0xFFFF_FFFF
        write(RIP, after & MASK64)
        if shadow := read(INTERRUPTIBILITY) & SHADOW:
            write(INTERRUPTIBILITY, read(INTERRUPTIBILITY) ^ shadow)
        flags = read(RFLAGS_FIELD)
        if flags & RF:  # it lasts for one instruction
            write(RFLAGS_FIELD, flags ^ RF)
        if flags & TF:
            write(PENDING_DEBUG, read(PENDING_DEBUG) | SINGLE_STEP)

    def clear_blocking(self) -> None:
        self.write(INTERRUPTIBILITY, 0)
        self.write(PENDING_DEBUG, 0)

    @property
    def is_inside(self) -> bool:
        return self.processor.in_guest

    def run(self, budget: int) -> Exit:
        return self.processor.run(budget)

    def kick(self) -> None:
        self.processor.kick()

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
        if nmis and self.virtual_nmis:
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
        return bool(self.read(RFLAGS_FIELD) & IF) and not self.read(INTERRUPTIBILITY) & SHADOW

    def takes_nmis(self) -> bool:
        return not self.read(INTERRUPTIBILITY) & NMI_BLOCKED

    def block_nmis(self) -> None:
        """An IRET that unblocked NMIs did not complete."""
        self.write(INTERRUPTIBILITY, self.read(INTERRUPTIBILITY) | Interruptibility.NMI.mask)

    def unblock_nmis(self) -> None:
        """An NMI that is to be delivered again must find NMIs unblocked."""
        self.write(INTERRUPTIBILITY, self.read(INTERRUPTIBILITY) & ~Interruptibility.NMI.mask)

    # --- time ---

    @property
    def tsc(self) -> int:
        return self.processor.tsc

    @property
    def retired(self) -> int:
        return self.processor.retired

    def set_tsc_offset(self, offset: int) -> None:
        self.write(Vmcs.TSC_OFFSET, offset & MASK64)

    def advance(self, ticks: int) -> None:
        self.processor.advance(ticks)

    def arm(self, ticks: int) -> None:
        self.write(TIMER, ticks if ticks < 0xFFFF_FFFF else 0xFFFF_FFFF)

    # --- translations ---

    def load_root(self, hpa: int) -> None:
        self.write(GUEST_CR3, hpa)

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        read = self.read
        return {
            "processor": self.processor.save().hex(),
            "fields": {name: read(field) for name, field in KEPT.items()},
            "control": list(self.control()),
            "windows": self.current_primary & WINDOWS,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """The VMCS is made anew: of a snapshot it holds guest registers and nothing else."""
        processor = self.processor
        processor.load(bytes.fromhex(saved["processor"]))
        if processor.in_guest:
            raise ValueError("snapshot: the processor was saved inside the guest")
        processor.vmxoff()
        self._enter_operation()
        self._execution_controls()
        self._exit_and_entry_controls()
        self._host_state()
        self.resume = self._launch
        cr0, cr3, cr4, efer, pdptes = saved["control"]
        self.load_control(Control(cr0, cr3, cr4, efer, tuple(pdptes)))
        self.write(Vmcs.VMCS_LINK_POINTER, MASK64)
        for name, field in KEPT.items():
            if name not in BY_CONTROL:
                self.write(field, saved["fields"][name])
        self.current_primary = self.primary | saved["windows"] & WINDOWS
        self.write(Vmcs.PRIMARY_CONTROLS, self.current_primary)

    def code_at(self, gva: int, length: int) -> bytes:
        read, eptp = self.read, self.paging.eptp
        cr3, cr4, efer = read(GUEST_CR3), read(Vmcs.GUEST_CR4), read(Vmcs.GUEST_EFER)
        memory, code = self.host.memory, b""
        while length:
            part = min(length, PAGE - (gva & PAGE - 1))
            walked = self.processor.walk(gva, cr3, cr4, efer, eptp)
            level, entry = walked[-1][1::2] if walked else (0, 0)
            if not entry & PRESENT:
                break
            inside = (1 << 3 + 9 * level) - 1
            hpa = entry & ADDRESS & ~inside | gva & inside
            code += memory.read(hpa, part)
            gva, length = gva + part, length - part
        return code

    def forget(self, addresses: Sequence[int] | None) -> None:
        processor = self.processor
        if processor.in_guest:
            processor.flush()
        elif self.paging.eptp:
            processor.invept(ONE_CONTEXT, self.paging.eptp)
        elif addresses is None:
            processor.invvpid(ONE_CONTEXT, VPID)
        else:
            for gva in addresses:
                processor.invvpid(ONE_ADDRESS, VPID, gva)

    def forget_guest(self) -> None:
        """What the guest's own tables have led to: it has loaded CR3 by a task switch."""
        self.processor.invvpid(ONE_CONTEXT, VPID)


GPRS: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
LIVE: Final = frozenset({"cr2", "dr0", "dr1", "dr2", "dr3", "dr6"})
"""Registers that neither entries nor exits touch."""
