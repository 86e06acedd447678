"""Instructions that have trapped, carried out on the guest's virtual registers.

A function gets the guest and the instruction, decoded at address 0.  It returns None when all is
done, or what `answers/` is to be asked, which then goes past the instruction.  What it cannot do it
refuses with NotHere or GuestFault, having changed nothing.

Source: SDM 2, the instructions' own pages.
Invariant: whoever carries out an instruction that would not exit in VMX operation ticks.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.address import is_canonical
from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.segment import SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import SecondaryControls
from understudy.execution.deprivileged import segments, system_calls, tables
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descriptors import NotHere
from understudy.execution.deprivileged.live import Live
from understudy.execution.vmx.operation import PASSED
from understudy.guest import Event, Kind
from understudy.instructions.interpreter import decode
from understudy.instructions.operands import LOW32, MASK64, operand_address
from understudy.silicon import Exit

CarryOut = Callable[[Live, iced.Instruction], Exit | None]
RAX, RCX, RDX, RSI, RDI = 0, 1, 2, 6, 7
IF: Final = RFLAGS.IF.mask
AC: Final = RFLAGS.AC.mask
RF: Final = RFLAGS.RF.mask
IOPL: Final = 3 << 12
PUSHED: Final = ~int(RFLAGS(RF=1, VM=1))
POPPED: Final = int(RFLAGS(ID=1, AC=1, NT=1, OF=1, DF=1, IF=1, TF=1, SF=1, ZF=1, AF=1, PF=1, CF=1))
TS: Final = CR0.TS.mask
WBINVD_EXITING: Final = SecondaryControls.WBINVD_EXITING.mask
EFER: Final = Msr.IA32_EFER
HELD: Final = frozenset(PASSED) - {EFER}
FIELDS: Final = {
    Msr.IA32_SYSENTER_CS: Vmcs.GUEST_SYSENTER_CS, Msr.IA32_SYSENTER_ESP: Vmcs.GUEST_SYSENTER_ESP,
    Msr.IA32_SYSENTER_EIP: Vmcs.GUEST_SYSENTER_EIP, Msr.IA32_PAT: Vmcs.GUEST_PAT,
    Msr.IA32_FS_BASE: Vmcs.GUEST_FS_BASE, Msr.IA32_GS_BASE: Vmcs.GUEST_GS_BASE,
}  # fmt: skip
MEMORY_TYPES: Final = (0, 1, 4, 5, 6, 7)  # of IA32_PAT
MASKED: Final = {Msr.IA32_SYSENTER_CS: LOW32}
CRS: Final = {getattr(iced.Register, f"CR{n}"): n for n in (0, 2, 3, 4, 8)}


class Step(NamedTuple):
    """A decoded instruction and what carries it out."""

    name: str
    instruction: iced.Instruction
    carry_out: CarryOut | None  # None: it does nothing that only a kernel may
    for_programs: bool  # whether programs may execute it as well


def done(guest: Live, instruction: iced.Instruction) -> None:
    """It is carried out: go past it."""
    guest.tick()
    guest.skip(instruction.len)


# --- flags ---


def cli(guest: Live, instruction: iced.Instruction) -> None:
    """CLI."""
    guest.rflags = guest.rflags & ~IF
    done(guest, instruction)


def sti(guest: Live, instruction: iced.Instruction) -> None:
    """STI."""
    old = guest.rflags
    guest.rflags = old | IF
    done(guest, instruction)
    if not old & IF:
        guest.begin_shadow()


def stac(guest: Live, instruction: iced.Instruction) -> None:
    """STAC, CLAC."""
    flags = guest.rflags
    guest.rflags = flags | AC if instruction.mnemonic == Mnemonic.STAC else flags & ~AC
    done(guest, instruction)


def pushf(guest: Live, instruction: iced.Instruction) -> None:
    """PUSHF, with the flags that the guest has."""
    size = -instruction.stack_pointer_increment
    segments.push(guest, size, guest.rflags & PUSHED)
    done(guest, instruction)


def popf(guest: Live, instruction: iced.Instruction) -> None:
    """POPF."""
    size = instruction.stack_pointer_increment
    value = segments.top(guest, size)
    segments.drop(guest, size)
    old, cpl = guest.rflags, guest.cpl()
    mask = POPPED if size > 2 else POPPED & 0xFFFF
    if cpl > old >> 12 & 3:
        mask &= ~IF
    if not cpl:
        mask |= IOPL
    done(guest, instruction)  # a TF that it sets makes a trap behind the next one
    guest.rflags = old & ~(mask | RF) | value & mask


# --- control registers ---


def mov_from_cr(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """MOV from a control register."""
    number = CRS[instruction.op1_register]
    register = iced.RegisterExt.number(instruction.op0_register)
    if number in (3, 8):
        return _cr_access(number, 1, register, instruction)
    if number == 2:
        value = guest.cr2
    else:
        control = guest.control()
        value = control.cr0 if number == 0 else control.cr4
    guest.set_gpr(register, value)
    done(guest, instruction)
    return None


def mov_to_cr(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """MOV to a control register."""
    number = CRS[instruction.op0_register]
    register = iced.RegisterExt.number(instruction.op1_register)
    if number == 2:
        guest.set_cr2(guest.gpr(register) & (MASK64 if guest.is_code64() else LOW32))
        done(guest, instruction)
        return None
    guest.forget_walks()
    return _cr_access(number, 0, register, instruction)


def _cr_access(number: int, kind: int, register: int, instruction: iced.Instruction) -> Exit:
    qualification = number | kind << 4 | register << 8
    return question(Reason.CR_ACCESS, qualification, length=instruction.len)


def clts(guest: Live, instruction: iced.Instruction) -> None:
    """CLTS."""
    guest.write(Vmcs.GUEST_CR0, guest.read(Vmcs.GUEST_CR0) & ~TS)
    done(guest, instruction)


def invlpg(guest: Live, instruction: iced.Instruction) -> Exit:
    """INVLPG."""
    guest.forget_walks()
    gva = operand_address(instruction, guest.code_bits())(guest)
    return question(Reason.INVLPG, gva, length=instruction.len)


# --- descriptor tables ---


def load_table(guest: Live, instruction: iced.Instruction) -> None:
    """LGDT, LIDT."""
    is_64 = guest.is_code64()
    at = segments.operand(guest, instruction)
    memory, size = guest.memory(), 8 if is_64 else 4
    limit, base = memory.load(at, 2), memory.load(at + 2, size)
    if not is_64 and instruction.memory_size == iced.MemorySize.FWORD6 and _is_short(instruction):
        base &= 0xFF_FFFF
    if not is_canonical(base):
        raise NotHere
    is_gdt = instruction.mnemonic == Mnemonic.LGDT
    guest.write(Vmcs.GUEST_GDTR_BASE if is_gdt else Vmcs.GUEST_IDTR_BASE, base)
    guest.write(Vmcs.GUEST_GDTR_LIMIT if is_gdt else Vmcs.GUEST_IDTR_LIMIT, limit)
    done(guest, instruction)


def _is_short(instruction: iced.Instruction) -> bool:
    return instruction.code in (iced.Code.LGDT_M1632_16, iced.Code.LIDT_M1632_16)


# --- MSRs, time, CPUID ---


def rdmsr(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """RDMSR."""
    index = guest.gpr(RCX) & LOW32
    if index not in HELD:
        return question(Reason.RDMSR, length=instruction.len)
    field = FIELDS.get(Msr(index))
    value = guest.processor.rdmsr(index) if field is None else guest.read(field)
    _set_pair(guest, value)
    done(guest, instruction)
    return None


def wrmsr(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """WRMSR."""
    index = guest.gpr(RCX) & LOW32
    if index not in HELD:
        return question(Reason.WRMSR, length=instruction.len)
    value = (guest.gpr(RDX) & LOW32) << 32 | guest.gpr(RAX) & LOW32
    field = FIELDS.get(Msr(index))
    if field is None:
        try:
            guest.processor.wrmsr(index, value)
        except KeyError:
            raise NotHere from None
    else:
        if index != Msr.IA32_SYSENTER_CS and not fits(index, value):
            raise NotHere
        guest.write(field, value & MASKED.get(Msr(index), MASK64))
    done(guest, instruction)
    return None


def fits(index: int, value: int) -> bool:
    """Whether an MSR takes this value."""
    if index == Msr.IA32_PAT:
        return all(kind in MEMORY_TYPES for kind in value.to_bytes(8, "little"))
    return is_canonical(value)


def _set_pair(guest: Live, value: int) -> None:
    guest.set_gpr(RAX, value & LOW32)
    guest.set_gpr(RDX, value >> 32)


def rdtsc(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """RDTSC, RDTSCP."""
    is_rdtscp = instruction.mnemonic == Mnemonic.RDTSCP
    if guest.shows_own_time() or (guest.cpl() and guest.control().cr4 & CR4.TSD.mask):
        raise NotHere
    if is_rdtscp:
        if "rdtscp" not in guest.model.shown:
            raise NotHere
        guest.set_gpr(RCX, guest.processor.rdmsr(Msr.IA32_TSC_AUX) & LOW32)
    _set_pair(guest, guest.processor.tsc + guest.read(Vmcs.TSC_OFFSET) & MASK64)
    done(guest, instruction)
    return None


def xsetbv(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """XSETBV."""
    if not guest.control().cr4 & CR4.OSXSAVE.mask:
        not_there(guest, instruction)
        return None
    return question(Reason.XSETBV, length=instruction.len)


def _ask(reason: Reason) -> CarryOut:
    """What needs nothing said but its length."""
    return lambda guest, instruction: question(reason, length=instruction.len)


# --- ports ---


def port(guest: Live, instruction: iced.Instruction) -> Exit:
    """IN, OUT."""
    is_in = instruction.mnemonic == Mnemonic.IN
    data, place = (0, 1) if is_in else (1, 0)
    is_immediate = instruction.op_kind(place) == OpKind.IMMEDIATE8
    number = instruction.immediate8 if is_immediate else guest.gpr(RDX) & 0xFFFF
    size = iced.RegisterExt.size(instruction.op_register(data))
    access = size - 1 | is_in << 3 | is_immediate << 6 | number << 16
    return question(Reason.IO_INSTRUCTION, access, length=instruction.len)


def port_string(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """INS, OUTS.  Repeated 0 times there is neither an access nor an exit."""
    is_in = instruction.mnemonic in (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD)
    at = next(n for n in range(2) if instruction.op_kind(n) != OpKind.REGISTER)
    kind = instruction.op_kind(at)
    bits = ADDRESS_BITS.get(kind)
    if bits is None:
        raise NotHere
    mask = (1 << bits) - 1
    repeats = instruction.has_rep_prefix or instruction.has_repne_prefix
    if repeats and not guest.gpr(RCX) & mask:
        done(guest, instruction)
        return None
    offset = guest.gpr(RDI if is_in else RSI) & mask
    segment = SegmentName.ES if is_in else segments.NUMBERS[instruction.memory_segment]
    segments.check(guest, segment, write=is_in)
    if not guest.is_code64() or segment >= SegmentName.FS:
        offset += guest.segment_base(segment)
    gva = offset & (MASK64 if guest.is_code64() else LOW32)
    size = iced.MemorySizeExt.size(instruction.memory_size)
    access = size - 1 | is_in << 3 | 1 << 4 | repeats << 5 | (guest.gpr(RDX) & 0xFFFF) << 16
    info = (16, 32, 64).index(bits) << 7
    return question(Reason.IO_INSTRUCTION, access, length=instruction.len, gla=gva, instr_info=info)


ADDRESS_BITS: Final = {
    OpKind.MEMORY_ESDI: 16, OpKind.MEMORY_ESEDI: 32, OpKind.MEMORY_ESRDI: 64,
    OpKind.MEMORY_SEG_SI: 16, OpKind.MEMORY_SEG_ESI: 32, OpKind.MEMORY_SEG_RSI: 64,
}  # fmt: skip


# --- others ---


def not_there(guest: Live, instruction: iced.Instruction) -> None:
    """An instruction that the guest has not got: its CPU model does not show it, or CR4."""
    guest.reflect(Event(Vector.UD, Kind.EXCEPTION))


def wbinvd(guest: Live, instruction: iced.Instruction) -> Exit | None:
    """WBINVD: there is no cache to see."""
    if guest.asked[1] & WBINVD_EXITING:
        return question(Reason.WBINVD, length=instruction.len)
    done(guest, instruction)
    return None


def handed_over(guest: Live, instruction: iced.Instruction) -> None:
    """VMX executes it."""
    raise NotHere


M = Mnemonic
KERNEL: Final[dict[int, CarryOut]] = {
    M.CLI: cli, M.STI: sti, M.STAC: stac, M.CLAC: stac, M.CLTS: clts, M.INVLPG: invlpg,
    M.LGDT: load_table, M.LIDT: load_table, M.RDMSR: rdmsr, M.WRMSR: wrmsr,
    M.HLT: _ask(Reason.HLT), M.INVD: _ask(Reason.INVD), M.WBINVD: wbinvd,
    M.XSETBV: xsetbv, M.IN: port, M.OUT: port, M.INSB: port_string,
    M.INSW: port_string, M.INSD: port_string, M.OUTSB: port_string, M.OUTSW: port_string,
    M.OUTSD: port_string, M.SWAPGS: system_calls.swapgs,
    M.SYSEXIT: system_calls.sysexit, M.SYSEXITQ: handed_over,
    M.LMSW: handed_over, M.LLDT: tables.lldt, M.LTR: tables.ltr, M.INVPCID: tables.invpcid,
    M.MONITOR: not_there, M.MWAIT: not_there,
}  # fmt: skip
"""What only level 0 may execute."""
OF_VMX: Final = (
    M.VMXON, M.VMXOFF, M.VMCLEAR, M.VMPTRLD, M.VMPTRST, M.VMREAD, M.VMWRITE, M.VMLAUNCH,
    M.VMRESUME, M.VMFUNC, M.INVEPT, M.INVVPID,
)  # fmt: skip
EVERYBODY: Final[dict[int, CarryOut]] = {
    M.PUSHF: pushf, M.PUSHFD: pushf, M.PUSHFQ: pushf, M.POPF: popf, M.POPFD: popf, M.POPFQ: popf,
    M.CPUID: _ask(Reason.CPUID), M.RDTSC: rdtsc, M.RDTSCP: rdtsc, M.RDPMC: handed_over,
    M.VMCALL: _ask(Reason.VMCALL), M.SYSCALL: system_calls.syscall, M.SYSRET: handed_over,
    M.SYSRETQ: system_calls.sysretq,
    M.SYSENTER: system_calls.sysenter, M.IRET: segments.iret, M.IRETD: segments.iret,
    M.IRETQ: segments.iretq, M.SGDT: segments.store_table, M.SIDT: segments.store_table,
    M.SMSW: segments.smsw, M.SLDT: segments.store_selector, M.STR: segments.store_selector,
    M.LAR: tables.ask, M.LSL: tables.ask, M.VERR: tables.ask, M.VERW: tables.ask,
    M.LDS: handed_over, M.LES: handed_over, M.LSS: handed_over, M.LFS: handed_over,
    M.LGS: handed_over, M.RETF: tables.far_return,
    **dict.fromkeys((M.XSAVES, M.XSAVES64, M.XRSTORS, M.XRSTORS64), handed_over),
    **dict.fromkeys(OF_VMX, not_there),
}  # fmt: skip
"""What programs may execute as well, or find missing (#UD) before it is refused (#GP)."""
NAMES: Final = {
    value: name for name, value in vars(Mnemonic).items() if isinstance(value, int)
}  # fmt: skip


def step_of(code: bytes, bits: int) -> Step:
    """How to carry out the instruction at the beginning of `code`."""
    instruction = decode(code, bits)
    mnemonic = instruction.mnemonic
    name = NAMES.get(mnemonic, "INVALID")
    carry_out = KERNEL.get(mnemonic)
    if carry_out is not None:
        return Step(name, instruction, carry_out, False)
    carry_out = EVERYBODY.get(mnemonic)
    if carry_out is not None:
        return Step(name, instruction, carry_out, True)
    if mnemonic in (M.MOV, M.PUSH, M.POP):
        return _with_register(name, instruction)
    if instruction.is_jmp_far or instruction.is_jmp_far_indirect:
        return Step(name, instruction, tables.jump, True)
    if instruction.is_call_far or instruction.is_call_far_indirect:
        return Step(name, instruction, handed_over, True)
    return Step(name, instruction, None, True)


def _with_register(name: str, instruction: iced.Instruction) -> Step:
    """MOV, PUSH and POP of a segment register, and MOV of a control or debug register."""
    for n in range(instruction.op_count):
        if instruction.op_kind(n) != OpKind.REGISTER:
            continue
        register = instruction.op_register(n)
        if register in segments.NUMBERS:
            return Step(f"{name} Sreg", instruction, segments.MOVES[name, n], True)
        if register in CRS:
            return Step(f"{name} CR", instruction, mov_from_cr if n else mov_to_cr, False)
        if iced.RegisterExt.is_dr(register):
            return Step(f"{name} DR", instruction, tables.mov_dr, False)
    return Step(name, instruction, None, True)
