"""The guest's CR0, CR3, CR4, EFER and PDPTEs: what it sees, and what the processor has instead.

Source: SDM 3C, "Guest/Host Masks and Read Shadows for CR0 and CR4", "Guest Register State",
"Checks on Guest Control Registers, Debug Registers, and MSRs".

With EPT the processor holds the guest's own values, but for a few bits that VMX operation fixes.
Without, they are kept here.  The processor then always pages, in the format of the hypervisor's
tables: Intel 64 for a guest in IA-32e mode, PAE for every other, with CR0.WP and EFER.NXE set, so
that those tables can refuse writes and fetches to any guest; CR4.PGE and CR4.PCIDE are clear,
because they are tagged by nothing but their root.

Invariants: what the guest reads is what it wrote; the values in the VMCS pass the entry checks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from understudy.arch.cr import CR0, CR4
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER, Msr
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import EntryControls, PrimaryControls, SecondaryControls
from understudy.guest import Control

if TYPE_CHECKING:
    from understudy.paging import View
    from understudy.vcpu.cpu_model import CpuModel

MASK64: Final = (1 << 64) - 1
FIXED: Final = int(CR0(NE=1, CD=1, NW=1))
"""Bits of CR0 that the host owns: NE is fixed in VMX operation, and entries load no CD or NW."""
CACHE: Final = int(CR0(CD=1, NW=1))
IA32E: Final = EntryControls.IA32E_MODE_GUEST.mask
CR0_PAGING: Final = int(CR0(PG=1, WP=1, PE=1))
CR4_PAGING: Final = int(CR4(SMAP=1, SMEP=1, PCIDE=1, PGE=1, PAE=1, PSE=1))
PAGING_EXCEPTIONS: Final = 1 << Vector.PF
PG: Final = CR0.PG.mask
LMA: Final = EFER.LMA.mask
LME: Final = EFER.LME.mask


class ControlRegisters(ABC):
    """Where the registers are kept."""

    primary: PrimaryControls  # exits that keeping them so needs
    secondary: SecondaryControls
    values = Control(0, 0, 0, 0)  # what is in no field of the VMCS

    def __init__(
        self,
        read: Callable[[int], int],
        write: Callable[[int, int], None],
        intercept: Callable[[int, bool], None],
        view: "View",
        model: "CpuModel",
        cr4_fixed: int,
    ) -> None:
        """`read`, `write`: of the VMCS.  `intercept`: whether accesses to an MSR exit."""
        self.read, self.write, self.intercept = read, write, intercept
        self.view, self.cr4_fixed, self.cr4_allowed = view, cr4_fixed, int(model.cr4_allowed)
        self.model = model

    @abstractmethod
    def get(self) -> Control:
        """All of them."""

    def paging_control(self) -> Control:
        """The same, but only bits that decide how addresses translate are sure to be right."""
        return self.get()

    @abstractmethod
    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        """The guest has loaded CR3, and nothing else changes."""

    @abstractmethod
    def load(self, values: Control) -> None:
        """Set all of them, and the controls of the VMCS that make the guest see them so."""

    def _set_mode(self, cr0: int, efer: int) -> None:
        """Write EFER, whose LMA must agree with the entry control "IA-32e mode guest"."""
        self.write(Vmcs.GUEST_EFER, efer)
        controls = self.read(Vmcs.ENTRY_CONTROLS)
        self.write(Vmcs.ENTRY_CONTROLS, controls | IA32E if efer & LMA else controls & ~IA32E)


class InProcessor(ControlRegisters):
    """With EPT."""

    primary = PrimaryControls(0)
    secondary = SecondaryControls(UNRESTRICTED_GUEST=1, ENABLE_EPT=1)

    def get(self) -> Control:
        read = self.read
        cr0 = read(Vmcs.GUEST_CR0) & ~FIXED | read(Vmcs.CR0_READ_SHADOW) & FIXED
        mask = read(Vmcs.CR4_GUEST_HOST_MASK)
        cr4 = read(Vmcs.GUEST_CR4) & ~mask | read(Vmcs.CR4_READ_SHADOW) & mask
        pdptes = tuple(read(Vmcs.GUEST_PDPTE0 + 2 * n) for n in range(4))
        return Control(cr0, read(Vmcs.GUEST_CR3), cr4, read(Vmcs.GUEST_EFER), pdptes)

    def load(self, values: Control) -> None:
        write = self.write
        write(Vmcs.CR0_GUEST_HOST_MASK, FIXED | self.view.watched_cr0)
        write(Vmcs.CR4_GUEST_HOST_MASK, ~self.cr4_allowed & MASK64)
        write(Vmcs.EXCEPTION_BITMAP, 0)
        write(Vmcs.EPT_POINTER, self.view.eptp)
        self.intercept(Msr.IA32_EFER, self.model.hides_efer)
        write(Vmcs.GUEST_CR0, values.cr0 | CR0.NE.mask)
        write(Vmcs.CR0_READ_SHADOW, values.cr0)
        write(Vmcs.GUEST_CR3, values.cr3)
        write(Vmcs.GUEST_CR4, values.cr4 | self.cr4_fixed)
        write(Vmcs.CR4_READ_SHADOW, values.cr4)
        for n, entry in enumerate(values.pdptes):
            write(Vmcs.GUEST_PDPTE0 + 2 * n, entry)
        self._set_mode(values.cr0, values.efer)

    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        """As the processor's own load of it."""
        self.write(Vmcs.GUEST_CR3, cr3)
        for n, entry in enumerate(pdptes):
            self.write(Vmcs.GUEST_PDPTE0 + 2 * n, entry)


class InHypervisor(ControlRegisters):
    """Without EPT."""

    primary = PrimaryControls(CR3_STORE_EXITING=1, CR3_LOAD_EXITING=1, INVLPG_EXITING=1)
    secondary = SecondaryControls(0)

    def get(self) -> Control:
        """The bits that the guest owns are in the VMCS."""
        cr0 = self.read(Vmcs.GUEST_CR0)
        cr4 = self.read(Vmcs.GUEST_CR4)
        kept, cr0_mask, cr4_mask = self.values, FIXED | CR0_PAGING, self._cr4_mask
        return kept._replace(
            cr0=cr0 & ~cr0_mask | kept.cr0 & cr0_mask, cr4=cr4 & ~cr4_mask | kept.cr4 & cr4_mask
        )

    @property
    def _cr4_mask(self) -> int:
        return ~self.cr4_allowed & MASK64 | CR4_PAGING

    def load(self, values: Control) -> None:
        write = self.write
        self.values = values
        write(Vmcs.CR0_GUEST_HOST_MASK, FIXED | CR0_PAGING)
        write(Vmcs.CR4_GUEST_HOST_MASK, self._cr4_mask)
        write(Vmcs.EXCEPTION_BITMAP, PAGING_EXCEPTIONS)
        write(Vmcs.EPT_POINTER, 0)
        self.intercept(Msr.IA32_EFER, True)
        write(Vmcs.GUEST_CR0, values.cr0 & ~CACHE | CR0_PAGING | CR0.NE.mask)
        write(Vmcs.CR0_READ_SHADOW, values.cr0)
        cr4 = values.cr4 & ~CR4_PAGING | CR4.PAE.mask | self.cr4_fixed
        if values.cr0 & PG:
            cr4 |= values.cr4 & (CR4.SMEP.mask | CR4.SMAP.mask)
        write(Vmcs.GUEST_CR4, cr4)
        write(Vmcs.CR4_READ_SHADOW, values.cr4)
        efer = values.efer & ~(LMA | LME) | EFER.NXE.mask
        self._set_mode(values.cr0, efer | LMA | LME if values.efer & LMA else efer)

    def paging_control(self) -> Control:
        return self.values

    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        """Only CR3, which is in no field of the VMCS."""
        cr0, _, cr4, efer, _ = self.values
        self.values = Control(cr0, cr3, cr4, efer, pdptes)
