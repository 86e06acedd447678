"""Roots of shadow tables: by what they are found again, and what they look like.

Source: SDM 3A, "Paging Modes and Control Bits": what CR3, or the PDPTE registers, say.
Invariant: two address spaces with the same key have the same tables.
"""

from understudy.arch.address import PAGE_SHIFT
from understudy.paging.guest_walk import INTEL64, Regime
from understudy.paging.quadrants import COMPOSED
from understudy.state import restore

RootKey = tuple[int, ...]


def root_key(regime: Regime) -> RootKey:
    """What tells the guest's address spaces apart."""
    if regime.is_pae:
        assert regime.pdptes is not None
        return regime.pdptes
    return () if regime.format is None else (regime.root >> PAGE_SHIFT,)


def saved_root(regime: Regime, saved: object) -> tuple[RootKey, tuple[int, int, int]]:
    """The key of a root and of its shadow page; ValueError if this regime has no such root."""
    key, page = restore(tuple[tuple[int, ...], tuple[int, int, int]], saved, "a shadow root")
    if regime.format is INTEL64:
        fits = len(key) == 1 and page == (key[0], 4, 0)
    else:
        fits = page[1:] == (3, COMPOSED)
    if not fits:
        raise ValueError(f"snapshot: {page} is no root of shadow tables for {key}")
    return key, page
