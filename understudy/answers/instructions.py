"""Instructions that ask about or wait in the machine: CPUID, HLT, MSRs, VMCALL and others.

Source: SDM 2, the instructions' own pages; Linux, Documentation/virt/kvm/x86/hypercalls.rst.

Each function gets the vCPU and the instruction, decides, and returns the verdict.
Invariants: nothing that a guest does raises here; whatever a guest may not do ends as the
exception that hardware would raise.
"""

from typing import Final, Protocol

from understudy.arch.cpuid import LeafExt1Edx
from understudy.arch.exception import Vector
from understudy.arch.msr import Msr
from understudy.vcpu.activity import Activity
from understudy.vcpu.cpu_model import ECX_FOLLOWS, XSAVE_LEAF
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, YIELDS, Stop, StopKind, Verdict

LOW32: Final = 0xFFFF_FFFF
MASK64: Final = (1 << 64) - 1
RAX, RCX, RDX, RBX = range(4)
X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2  # of XCR0
FOLLOWING: Final = {*ECX_FOLLOWS, XSAVE_LEAF}
"""Leaves in which something follows registers that a guest writes without an exit."""
EXTENDED_FEATURES: Final = 0x8000_0001
SYSCALL: Final = LeafExt1Edx.SYSCALL.mask
FIXED_COUNTERS: Final = 1 << 30
KVM_HC_KICK_CPU: Final = 5
KVM_ENOSYS: Final = (-1000) & (1 << 64) - 1
KVM_EPERM: Final = (-1) & (1 << 64) - 1


class Instruction(Protocol):
    """What these answers need to know of the instruction that they carry out."""

    @property
    def length(self) -> int:
        """Its bytes."""


def cpuid(vcpu: Vcpu, done: Instruction) -> Verdict:
    """The VM's CPU model answers.

    Intel's processors have SYSCALL in 64-bit mode only, and show it there only.
    """
    gpr, set_gpr = vcpu.read_gpr, vcpu.write_gpr
    leaf, subleaf = gpr(RAX) & LOW32, gpr(RCX) & LOW32
    answer = vcpu.answer(leaf, subleaf)
    if leaf in FOLLOWING:
        answer = vcpu.model.enabled(leaf, subleaf, answer, vcpu.guest)
    eax, ebx, ecx, edx = answer
    if leaf == EXTENDED_FEATURES and not vcpu.guest.is_code64():
        edx &= ~SYSCALL
    set_gpr(RAX, eax)
    set_gpr(RBX, ebx)
    set_gpr(RCX, ecx)
    set_gpr(RDX, edx)
    vcpu.skip(done.length)
    return RESUME


def xsetbv(vcpu: Vcpu, done: Instruction) -> Verdict:
    """XCR0, the only one there is, takes x87 always, AVX with SSE, and what the model shows."""
    gpr = vcpu.read_gpr
    value = gpr(RDX) << 32 & LOW32 << 32 | gpr(RAX) & LOW32
    is_whole = value & X87 and value & (SSE | AVX) != AVX
    if gpr(RCX) & LOW32 or not is_whole or value & ~vcpu.model.xcr0_allowed:
        return vcpu.fault(Vector.GP, 0)
    vcpu.guest.xcr0 = value
    vcpu.skip(done.length)
    return RESUME


def pause(vcpu: Vcpu, done: Instruction) -> Verdict:
    """PAUSE, in a loop: it waits for another processor, which may not be running."""
    vcpu.skip(done.length)
    vcpu.retire()
    return RESUME if vcpu.is_stepping else YIELDS


def hlt(vcpu: Vcpu, done: Instruction) -> Verdict:
    """Nothing to do until an event comes, such as the trap of a single step over HLT itself."""
    vcpu.skip(done.length)
    if not vcpu.guest.has_debug_trap():
        vcpu.state.activity = Activity.HLT
        vcpu.clock.hurry()
    vcpu.attention = True
    return RESUME


def rdmsr(vcpu: Vcpu, done: Instruction) -> Verdict:
    """An MSR that the processor does not hold for the guest; an unknown one is #GP(0)."""
    try:
        value = vcpu.msrs.read(vcpu.read_gpr(RCX) & LOW32)
    except KeyError:
        return vcpu.fault(Vector.GP, 0)
    vcpu.write_gpr(RAX, value & LOW32)
    vcpu.write_gpr(RDX, value >> 32)
    vcpu.skip(done.length)
    return RESUME


def wrmsr(vcpu: Vcpu, done: Instruction) -> Verdict:
    """A write to an MSR that the processor does not hold for the guest; a bad one is #GP(0)."""
    gpr = vcpu.read_gpr
    try:
        vcpu.msrs.write(gpr(RCX) & LOW32, gpr(RDX) << 32 & LOW32 << 32 | gpr(RAX) & LOW32)
    except KeyError:
        return vcpu.fault(Vector.GP, 0)
    vcpu.skip(done.length)
    return RESUME


def vmcall(vcpu: Vcpu, done: Instruction) -> Verdict:
    """KVM's hypercall ABI, of which pv_unhalt brings one call: to kick a vCPU."""
    number, result = vcpu.read_gpr(RAX), KVM_ENOSYS
    if vcpu.guest.cpl():
        result = KVM_EPERM
    elif number & LOW32 == KVM_HC_KICK_CPU and "pv_unhalt" in vcpu.model.shown:
        vcpu.kvm.kick_other(vcpu.read_gpr(RCX) & LOW32)
        result = 0
    vcpu.write_gpr(RAX, result & (MASK64 if vcpu.guest.is_code64() else LOW32))
    vcpu.skip(done.length)
    return RESUME


def not_offered(vcpu: Vcpu, refused: Instruction) -> Verdict:
    """An instruction of a feature that the CPU model does not show."""
    return vcpu.fault(Vector.UD)


def rdtsc(vcpu: Vcpu, done: Instruction) -> Verdict:
    """The time that the guest's clock says; it takes a tick, as where it does not exit."""
    return _read_counter(vcpu, Msr.IA32_TSC, done.length)


def rdtscp(vcpu: Vcpu, done: Instruction) -> Verdict:
    """The same, and the number that the guest has given to this processor."""
    vcpu.write_gpr(RCX, vcpu.guest.registers()["tsc_aux"] & LOW32)
    return rdtsc(vcpu, done)


def rdpmc(vcpu: Vcpu, done: Instruction) -> Verdict:
    """A performance counter by number: SDM 2B, "RDPMC"; those that the CPU model shows."""
    number = vcpu.read_gpr(RCX) & LOW32
    first = Msr.IA32_FIXED_CTR0 if number & FIXED_COUNTERS else Msr.IA32_PMC0
    try:
        return _read_counter(vcpu, first + (number & ~FIXED_COUNTERS), done.length)
    except KeyError:
        return vcpu.fault(Vector.GP, 0)


def _read_counter(vcpu: Vcpu, msr: int, length: int) -> Verdict:
    """EDX:EAX.  KeyError if there is none."""
    value = vcpu.msrs.read(msr)
    vcpu.write_gpr(RAX, value & LOW32)
    vcpu.write_gpr(RDX, value >> 32)
    vcpu.retire()
    vcpu.skip(length)
    return RESUME


def invd(vcpu: Vcpu, done: Instruction) -> Verdict:
    """INVD, which always exits: there is no cache to see."""
    vcpu.skip(done.length)
    return RESUME


def wbinvd(vcpu: Vcpu, done: Instruction) -> Verdict:
    """WBINVD, which exits where that is asked for: there is no cache to see."""
    vcpu.retire()
    return invd(vcpu, done)


def triple_fault(vcpu: Vcpu) -> Stop:
    """A PC resets now; a hypervisor can say where it happened."""
    return Stop(StopKind.TRIPLE_FAULT, "the guest's double-fault delivery failed")
