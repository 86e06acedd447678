"""The guest's registers, where VMX keeps them: in the VMCS, or live in the processor.

Source: SDM 3C, "Guest Register State".  MSRs that the VMCS does not hold (STAR and its kin) stay
in the processor while the vCPU is on it.
"""

from typing import Final

from understudy.arch.cr import CR0, CR4, RESET_DEBUG
from understudy.arch.msr import Msr
from understudy.arch.segment import Segment, TableRegister
from understudy.arch.vmcs import AccessRights, Vmcs
from understudy.execution.vmx.control_registers import FIXED
from understudy.execution.vmx.fields import GPRS, LIVE, MSR_NAMES, REGISTER_FIELDS, with_defaults
from understudy.execution.vmx.placement import Placement
from understudy.guest import RSP, Control
from understudy.machine.host import Host
from understudy.silicon import Processor

RIP: Final = int(Vmcs.GUEST_RIP)
RFLAGS_FIELD: Final = int(Vmcs.GUEST_RFLAGS)
GUEST_RSP: Final = int(Vmcs.GUEST_RSP)
GUEST_CR3: Final = int(Vmcs.GUEST_CR3)
SELECTOR, BASE = int(Vmcs.GUEST_ES), int(Vmcs.GUEST_ES_BASE)  # of ES; the next has two more
LIMIT, RIGHTS = int(Vmcs.GUEST_ES_LIMIT), int(Vmcs.GUEST_ES_ACCESS_RIGHTS)
CS_RIGHTS, SS_RIGHTS = int(Vmcs.GUEST_CS_ACCESS_RIGHTS), int(Vmcs.GUEST_SS_ACCESS_RIGHTS)
CODE64, CODE32 = AccessRights.L.mask, AccessRights.DB.mask
PE: Final = CR0.PE.mask
PKE, PKS = CR4.PKE.mask, CR4.PKS.mask
KEY_BITS: Final = PKE | PKS
NO_KEYS: Final = (0, 0)


RESET_LIVE: Final = RESET_DEBUG | {"xcr0": 1, "pkru": 0, "pkrs": 0}
YMM_REGISTERS, YMM_BYTES = 16, 32


class GuestState(Placement):
    """Registers of the guest of one vCPU in VMX operation."""

    cr0_always_exits = FIXED

    def __init__(self, host: Host, processor: Processor | None) -> None:
        super().__init__(host, processor)
        self.power_on_fx = self.processor.fxsave()

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
        self.processor.set_registers({name: late.pop(name) for name in LIVE & late.keys()})
        if unknown := late.keys() - {"cr8"}:
            raise KeyError(f"no such register: {', '.join(sorted(unknown))}")

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

    def reset(self) -> None:
        self.processor.fxrstor(self.power_on_fx)
        for number in range(YMM_REGISTERS):
            self.processor.set_ymm(number, bytes(YMM_BYTES))
        self.processor.set_registers(RESET_LIVE)

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

    def add_dr6(self, bits: int) -> int:
        value = int(self.processor.registers()["dr6"]) | bits
        if bits:
            self.processor.set_registers({"dr6": value})
        return value

    def fxsave(self) -> bytes:
        return self.processor.fxsave()

    def ymm(self, number: int) -> bytes:
        return self.processor.ymm(number)

    @property
    def xcr0(self) -> int:
        """It stays in the processor, where the host has no use for it."""
        return self.processor.registers()["xcr0"]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.processor.set_registers({"xcr0": value})

    def protection_keys(self) -> tuple[int, int]:
        cr4 = self.read(Vmcs.GUEST_CR4) & KEY_BITS
        if not cr4:
            return NO_KEYS
        user, supervisor = self.processor.protection_keys()
        return user if cr4 & PKE else 0, supervisor if cr4 & PKS else 0

    def stir(self, seed: bytes) -> None:
        self.processor.stir(seed)

    def set_cr2(self, value: int) -> None:
        self.processor.set_registers({"cr2": value})

    @property
    def debugctl(self) -> int:
        return self.read(Vmcs.GUEST_DEBUGCTL)

    @debugctl.setter
    def debugctl(self, value: int) -> None:
        self.write(Vmcs.GUEST_DEBUGCTL, value)

    # --- performance monitoring ---

    def read_pmu(self, index: int) -> int:
        if index == Msr.IA32_PERF_GLOBAL_CTRL:  # each entry loads it
            return self.read(Vmcs.GUEST_PERF_GLOBAL_CTRL)
        return self.processor.rdmsr(index)

    def write_pmu(self, index: int, value: int) -> None:
        if index == Msr.IA32_PERF_GLOBAL_CTRL:
            self.write(Vmcs.GUEST_PERF_GLOBAL_CTRL, value)
        else:
            self.processor.wrmsr(index, value)

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

    def idtr(self) -> TableRegister:
        return TableRegister(self.read(Vmcs.GUEST_IDTR_BASE), self.read(Vmcs.GUEST_IDTR_LIMIT))

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

    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        self.kept.note_cr3(cr3, pdptes)
