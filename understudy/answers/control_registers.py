"""Control registers and translations: MOV to and from CRn, LMSW, IA32_EFER, INVLPG, INVPCID.

Source: SDM 2B, "MOV - Move to/from Control Registers"; SDM 3A, "Control Registers", "Operations
that Invalidate TLBs and Paging-Structure Caches".

Invariants: nothing that a guest does raises here; an instruction that exits only because of the
paging technique counts as retired and takes a tick of virtual time, so that guest time is the same
under every technique.
"""

from collections.abc import Callable
from typing import Final

from understudy.arch.address import PHYSICAL, is_canonical
from understudy.arch.cr import CR0, CR4
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER, Msr
from understudy.arch.segment import SegmentName
from understudy.guest import Control
from understudy.instructions.strings import Places
from understudy.paging.guest_walk import GuestFault, Regime
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop, Verdict

PG: Final = CR0.PG.mask
PE: Final = CR0.PE.mask
LMA: Final = EFER.LMA.mask
LME: Final = EFER.LME.mask
IGNORED: Final = 0xFFFF_FFFF & ~int(CR0(
    PG=1, CD=1, NW=1, AM=1, WP=1, NE=1, ET=1, TS=1, EM=1, MP=1, PE=1
))  # fmt: skip
"""Reserved bits of CR0, which stay clear whatever is written (SDM 3A, "Control Registers")."""
RELOADS_CR0: Final = int(CR0(PG=1, CD=1, NW=1))
RELOADS_CR4: Final = int(CR4(SMEP=1, PGE=1, PAE=1, PSE=1))
TSS32_TYPE: Final = 1 << 3  # of a TSS's access rights: none of 16 bits
NO_FLUSH: Final = 1 << 63  # of CR3, under PCIDs


class Refused(Exception):
    """A value that the register does not take: #GP(0)."""


# --- what a register takes ---


def check_cr0(new: int, old: Control, *, is_code64: bool, is_tss16: bool = False) -> int:
    """The EFER that goes with this CR0.  Raises Refused."""
    if new >> 32 or (new & PG and not new & PE) or (new & CR0.NW.mask and not new & CR0.CD.mask):
        raise Refused
    efer = old.efer
    if new & ~old.cr0 & PG and efer & LME:
        if not old.cr4 & CR4.PAE.mask or is_code64 or is_tss16:
            raise Refused
        return efer | LMA
    if not new & PG and old.cr0 & PG:
        if efer & LMA and (is_code64 or old.cr4 & CR4.PCIDE.mask):
            raise Refused
        return efer & ~LMA
    return efer


def check_cr4(new: int, old: Control, allowed: int) -> None:
    """Also SDM 3A, "Process-Context Identifiers (PCIDs)".  Raises Refused."""
    if new & ~allowed or (old.efer & LMA and not new & CR4.PAE.mask):
        raise Refused
    if new & ~old.cr4 & CR4.PCIDE.mask and (not old.efer & LMA or old.cr3 & 0xFFF):
        raise Refused


def check_efer(new: int, old: Control) -> int:
    """The value to keep: LMA is the processor's.  SDM 4, "Architectural MSRs".  Raises Refused."""
    if new & ~int(EFER(NXE=1, LMA=1, LME=1, SCE=1)) or ((new ^ old.efer) & LME and old.cr0 & PG):
        raise Refused
    return new & ~LMA | old.efer & LMA


# --- MOV, LMSW ---


def write(vcpu: Vcpu, number: int, value: int, length: int) -> Verdict:
    """MOV to a control register."""
    try:
        WRITES[number](vcpu, value)
    except (Refused, GuestFault):
        return vcpu.fault(Vector.GP, 0)
    vcpu.skip(length)
    return RESUME


def read(vcpu: Vcpu, number: int, register: int, length: int) -> Verdict:
    """MOV from a control register to a general one."""
    vcpu.set_gpr(register, READS[number](vcpu))
    vcpu.skip(length)
    return RESUME


def lmsw(vcpu: Vcpu, source: int, length: int) -> Verdict:
    """LMSW: the low four bits of CR0, of which PE can only be set."""
    return write(vcpu, 0, vcpu.guest.control().cr0 & ~0xE | source & 0xF, length)


def _write_cr0(vcpu: Vcpu, value: int) -> None:
    guest = vcpu.guest
    old = guest.control()
    new = value & ~IGNORED | CR0.ET.mask
    is_tss16 = not guest.segment(SegmentName.TR).rights & TSS32_TYPE
    efer = check_cr0(new, old, is_code64=guest.is_code64(), is_tss16=is_tss16)
    values = old._replace(cr0=new, efer=efer)
    if (new ^ old.cr0) & RELOADS_CR0:
        values = values._replace(pdptes=vcpu.pdptes(Regime(*values)))
    guest.load_control(values)
    if (new ^ old.cr0) & PG:
        guest.forget_guest()
    if not (new ^ old.cr0) & guest.cr0_always_exits:
        vcpu.retire()
    vcpu.view.mode_change()


def _write_cr3(vcpu: Vcpu, value: int) -> None:
    guest = vcpu.guest
    old = guest.paging_control()
    if old.cr4 & CR4.PCIDE.mask:
        value &= ~NO_FLUSH
    if value & ~PHYSICAL:
        raise Refused
    pdptes = old.pdptes
    if not old.efer & LMA and old.cr4 & CR4.PAE.mask:
        pdptes = vcpu.pdptes(Regime(old.cr0, value, old.cr4, old.efer))
    guest.note_cr3(value, pdptes)
    vcpu.view.cr3_write()
    vcpu.retire()


def _write_cr4(vcpu: Vcpu, value: int) -> None:
    """With EPT only changes of what the CPU model does not offer exit, and those are refused.

    So what is not refused exits because of the paging technique alone, and counts as retired.
    """
    guest = vcpu.guest
    old = guest.control()
    check_cr4(value, old, int(vcpu.model.cr4_allowed))
    values = old._replace(cr4=value)
    if (value ^ old.cr4) & RELOADS_CR4:
        values = values._replace(pdptes=vcpu.pdptes(Regime(*values)))
    guest.load_control(values)
    vcpu.retire()
    vcpu.view.mode_change()


def _write_cr8(vcpu: Vcpu, value: int) -> None:
    if value >> 4:
        raise Refused
    vcpu.apic.tpr = value << 4
    vcpu.attention = True


def _read_cr3(vcpu: Vcpu) -> int:
    vcpu.retire()
    return vcpu.guest.control().cr3


def _read_cr8(vcpu: Vcpu) -> int:
    return vcpu.apic.tpr >> 4


WRITES: Final[dict[int, Callable[[Vcpu, int], None]]] = {
    0: _write_cr0, 3: _write_cr3, 4: _write_cr4, 8: _write_cr8,
}  # fmt: skip
READS: Final[dict[int, Callable[[Vcpu], int]]] = {3: _read_cr3, 8: _read_cr8}


# --- IA32_EFER ---


def offer_efer(vcpu: Vcpu) -> None:
    """Answer RDMSR and WRMSR of IA32_EFER, where they exit; clear what is hidden later."""

    def read_efer() -> int:
        vcpu.retire()
        return vcpu.guest.control().efer

    def write_efer(value: int) -> None:
        """KeyError is #GP(0)."""
        if value & ~vcpu.model.efer_allowed:
            raise KeyError(Msr.IA32_EFER)
        old = vcpu.guest.control()
        try:
            vcpu.guest.load_control(old._replace(efer=check_efer(value, old)))
        except Refused:
            raise KeyError(Msr.IA32_EFER) from None
        vcpu.retire()
        vcpu.view.mode_change()

    def follow() -> None:
        """Load the registers again: whether IA32_EFER exits depends on what is hidden."""
        old = vcpu.guest.control()
        vcpu.guest.load_control(old._replace(efer=old.efer & vcpu.model.efer_allowed))
        vcpu.view.mode_change()

    vcpu.msrs.extra[Msr.IA32_EFER] = read_efer, write_efer
    vcpu.msrs.efer_allowed_changed = follow


# --- invalidation ---


def invlpg(vcpu: Vcpu, gva: int, length: int) -> Verdict:
    """The guest drops one page's translations.  There are none where the address is not canonical:
    no fault is made of that (SDM 2A, "INVLPG"), and no technique need know.
    """
    if is_canonical(gva):
        vcpu.view.invlpg(gva)
    vcpu.retire()
    vcpu.skip(length)
    return RESUME


def invpcid(vcpu: Vcpu, kind: int, descriptor: int, length: int) -> Verdict | Stop:
    """One page (type 0), one address space (1), or all of them (2, 3).

    `descriptor`: the linear address of the memory operand.  Only the current address space can
    hold anything, or anything that a load of CR3 keeps.
    """
    translation = vcpu.translation()
    try:
        places = Places(vcpu)
        data = places.load(places.find(descriptor, 16, write=False))
    except GuestFault as fault:
        return vcpu.guest_fault(fault)
    pcid, gva = (int.from_bytes(data[n : n + 8], "little") for n in (0, 8))
    has_pcids = translation.cr4 & CR4.PCIDE.mask
    is_bad = (
        kind > 3 or pcid > 0xFFF or (kind == 0 and not is_canonical(gva))
        or (kind < 2 and not has_pcids and pcid)
    )  # fmt: skip
    if is_bad:
        return vcpu.fault(Vector.GP, 0)
    is_current = pcid == (translation.cr3 & 0xFFF if has_pcids else 0)
    if kind == 0 and is_current:
        vcpu.view.invlpg(gva)
    elif kind > 0 and (is_current or kind > 1):
        vcpu.view.flush()
    vcpu.retire()
    vcpu.skip(length)
    return RESUME
