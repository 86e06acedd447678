"""What an entry of a guest's table means: the mode in which it is read.

The same frame may be a table to two processors that read its entries differently, as one does that
has not set EFER.NXE yet, or is still in 32-bit paging.  Then it has a shadow for each.  Other bits
of CR0 and CR4 do not matter: SMEP, SMAP and keys the processor itself looks at, and it never
clears CR0.WP.

Source: what KVM's documentation of its shadow MMU calls a role; SDM 3A, "Paging Modes and Control
Bits".  Invariant: whatever is made of an entry depends on the entry and the role of its table.
"""

from typing import Final

from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER
from understudy.paging.guest_walk import INTEL64, Regime

PG: Final = CR0.PG.mask
MODES: Final = (  # CR4 and EFER, while CR0.PG is set
    (0, 0),
    (CR4.PSE.mask, 0),
    (CR4.PAE.mask, 0),
    (CR4.PAE.mask, EFER.LMA.mask),
)


class Role:
    """One way to read entries."""

    def __init__(self, number: int, regime: Regime) -> None:
        self.number = number
        self.regime = regime  # with no root
        self.entry_bytes, self.address_mask = regime.entry_bytes, regime.address_mask
        self.is_long = regime.format is INTEL64
        form = regime.format
        self.leaf_reserved = 0 if form is None else form.levels[-1].reserved_page
        self.leaf_reserved |= regime.reserved_nx


def _regimes() -> list[Regime]:
    modes = [(0, CR4.PAE.mask, 0), *((PG, cr4, efer) for cr4, efer in MODES)]
    both = (0, EFER.NXE.mask)
    return [Regime(cr0, 0, cr4, efer | nxe) for cr0, cr4, efer in modes for nxe in both]


ROLES: Final = tuple(Role(number, regime) for number, regime in enumerate(_regimes()))
BY_MODE: Final = {(role.regime.format, role.regime.nx): role for role in reversed(ROLES)}


def role_of(regime: Regime) -> Role:
    """That of the tables of this regime."""
    return BY_MODE[regime.format, regime.nx]
