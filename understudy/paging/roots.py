"""Roots of shadow tables: by what they are found again, and what they look like.

Source: SDM 3A, "Paging Modes and Control Bits": what CR3, or the PDPTE registers, say.
Invariants: two address spaces with the same key have the same tables; a root that a processor has
loaded is not forgotten.
"""

from collections.abc import Callable, Container
from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.paging.guest_walk import Regime
from understudy.paging.quadrants import COMPOSED
from understudy.paging.roles import ROLES, Role
from understudy.paging.shadow_page import Key, ShadowPage
from understudy.paging.shadow_pages import ShadowPages
from understudy.state import restore

KEPT: Final = 64
RootKey = tuple[int, ...]


class Roots:
    """Those of one VM: an address space that is not loaded keeps its root for a while."""

    def __init__(self, tables: ShadowPages, in_use: Callable[[], Container[ShadowPage]]) -> None:
        """in_use: those that processors have loaded."""
        self._tables, self._in_use = tables, in_use
        self.by_key: dict[RootKey, ShadowPage] = {}  # the one loaded last comes last
        self.loads = 0

    def load(self, key: RootKey, role: Role, number: int) -> tuple[ShadowPage, bool]:
        """A processor loads this address space after fault `number`; also whether it is new."""
        found = self.by_key.pop(key, None)
        root = found or self._new(key, role)
        self.loads += 1
        root.flood, root.loaded, root.used = 0, self.loads, number
        self.by_key[key] = root
        if len(self.by_key) > KEPT:
            in_use = self._in_use()
            for old in list(self.by_key)[: len(self.by_key) - KEPT]:
                if self.by_key[old] not in in_use:
                    self._forget(old)
        return root, found is None

    def _new(self, key: RootKey, role: Role) -> ShadowPage:
        if role.is_long:
            root = self._tables.page(key[1], 4, 0, role)
        else:
            numbers = [page.gfn for page in self.by_key.values() if page.quadrant == COMPOSED]
            root = self._tables.page(1 + max(numbers, default=0), 3, COMPOSED, role)
        root.is_root = True
        return root

    def _forget(self, key: RootKey) -> None:
        root = self.by_key.pop(key)
        root.is_root = False
        self._tables.release(root)

    def forget(self, page: ShadowPage) -> None:
        """This one leads nowhere any more."""
        for key in [key for key, root in self.by_key.items() if root is page]:
            self._forget(key)

    def clear(self, role: Role) -> None:
        """All tables that were read so are gone."""
        self.by_key = {key: root for key, root in self.by_key.items() if key[0] != role.number}


def root_key(regime: Regime, role: Role) -> RootKey:
    """What tells the guest's address spaces apart."""
    if regime.is_pae:
        assert regime.pdptes is not None
        return role.number, *regime.pdptes
    return (role.number,) if regime.format is None else (role.number, regime.root >> PAGE_SHIFT)


def saved_root(saved: object) -> tuple[RootKey, Key]:
    """The key of a root and of its shadow page; ValueError if there is no such root."""
    key, page = restore(tuple[tuple[int, ...], Key], saved, "a shadow root")
    number = key[0] if key else -1
    if not 0 <= number < len(ROLES):
        fits = False
    elif ROLES[number].is_long:
        fits = len(key) == 2 and page == (key[1], 4, 0, number)
    else:
        fits = page[1:] == (3, COMPOSED, number)
    if not fits:
        raise ValueError(f"snapshot: {page} is no root of shadow tables for {key}")
    return key, page
