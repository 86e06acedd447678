"""The way that a walk has gone through the guest's tables, entered into ours, from the root down.

Source: lecture, "A reminder on shadow page tables".  Invariants: each of our entries says what the
guest's entry of that level says, with the accessed and dirty flags that the walk has set; what is
entered depends on the walk and the role of the tables, and not on who asks.
"""

from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.paging.guest_walk import (
    ACCESSED,
    DIRTY,
    E_WRITE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    Found,
    Regime,
    frame_of,
)
from understudy.paging.quadrants import COMPOSED, DIRECT, direct, key_of
from understudy.paging.reverse_map import BLOCK
from understudy.paging.roles import Role
from understudy.paging.shadow_page import ShadowPage
from understudy.paging.shadow_pages import ShadowPages

READ_ONLY: Final = USER | NO_EXECUTE
RIGHTS: Final = READ_ONLY | WRITABLE
USED: Final = PRESENT | ACCESSED
ALL_RIGHTS: Final = USED | DIRTY | WRITABLE | USER
Place = tuple[ShadowPage, int]
"""An entry: its table, and which one it is."""


def enter(
    tables: ShadowPages, root: ShadowPage, regime: Regime, gva: int, error: int, found: Found,
    number: int,
) -> list[Place]:  # fmt: skip
    """Make the entries that a walk asks for; where they are, from the root down.

    number: that of the fault.
    """
    page, role = root, root.role
    places: list[Place] = []
    path = [entry | ACCESSED for _, entry in found.path]
    if path and error & E_WRITE:
        path[-1] |= DIRTY
    depth = -1
    while True:
        level, quadrant = page.level, page.quadrant
        index = gva >> 3 + 9 * level & (3 if quadrant == COMPOSED else 511)
        slot = page.hpa + 8 * index
        places.append((page, index))
        page.flood, page.used = 0, number
        if quadrant == COMPOSED:
            child, flags = _below_root(tables, role, regime, index), PRESENT
        elif quadrant < 0:
            frame = page.gfn + (index << 9 * (level - 1))
            if level == 1 or (level == 2 and tables.may_be_large(frame)):
                tables.map(slot, frame, ALL_RIGHTS | key_of(quadrant), level == 2)
                return places
            child, flags = tables.page(frame, level - 1, quadrant, role), ALL_RIGHTS
        else:
            depth += 1
            entry, is_page = path[depth], depth == len(path) - 1
            frame = named_frame(role, level, index, entry, is_page)
            if is_page and (level == 1 or (level == 2 and tables.may_be_large(frame))):
                tables.map(slot, frame, entry, level == 2)
                return places
            child, flags = _below(tables, role, level, index, entry, frame, is_page)
        tables.link(slot, child, flags)
        page = child


def _below_root(tables: ShadowPages, role: Role, regime: Regime, index: int) -> ShadowPage:
    """What an entry of a PAE root names: the guest's directory, a quarter of it, or RAM."""
    if regime.format is None:
        return tables.page(index << 18, 2, DIRECT, role)
    if regime.is_pae:
        assert regime.pdptes is not None
        directory = (regime.pdptes[index] & regime.address_mask) >> PAGE_SHIFT
        return tables.page(directory, 2, 0, role)
    return tables.page(regime.root >> PAGE_SHIFT, 2, index, role)


def named_frame(role: Role, level: int, index: int, entry: int, is_page: bool) -> int:
    """The frame that a guest's entry means to this entry of ours."""
    if role.entry_bytes == 8 or not is_page or level == 1:
        gfn = (entry & role.address_mask) >> PAGE_SHIFT
        return gfn & -(1 << 9 * (level - 1)) if is_page else gfn
    large = frame_of(entry, 22, 4)  # IA-32: half of 4 MBytes
    return (large >> PAGE_SHIFT) + (index & 1) * BLOCK


def _below(
    tables: ShadowPages, role: Role, level: int, index: int, entry: int, frame: int, is_page: bool
) -> tuple[ShadowPage, int]:
    """The table that stands for what a guest's entry names, and the rights to it."""
    if is_page:  # a large one, in pieces
        rights = entry & (RIGHTS if entry & DIRTY else READ_ONLY)
        return tables.page(frame, level - 1, direct(entry), role), USED | rights
    half = index & 1 if role.entry_bytes == 4 else 0
    return tables.page(frame, level - 1, half, role), USED | entry & RIGHTS
