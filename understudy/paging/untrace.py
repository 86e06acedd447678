"""When a traced frame is a page table no more: what its writes, and what leads to it, say.

Idea: a guest does not say that it uses a table's memory for something else, and each write to a
traced frame costs an exit.  Three signs: a write that is not to one entry; a few writes while no
root leads there that is loaded, or was in between; more writes, without a fault that went through
the table, than a table has entries.  Source: what KVM calls write flooding.

Invariant: a sign may be wrong.  Then the shadow is made again at the next use, so a sign that
costs a table its shadow must be rarer than what it saves: at most one loss of up to 512 entries
for `MOST` writes, unless the writes look like no table's.
"""

from collections.abc import Container, Mapping
from typing import Final

from understudy.arch.address import PAGE
from understudy.paging.shadow_page import ShadowPage

FEW: Final = 8  # writes to a table that is not in use
MOST: Final = 1024  # writes to one that is: the entries of the largest table


def is_entry_write(offset: int, length: int, entry_bytes: int) -> bool:
    """Whether these bytes are an entry, its half, or the byte with its first flags."""
    inside = offset % entry_bytes
    if length >= 4:
        return inside % 4 == 0 and inside + length <= entry_bytes
    return inside == 0


def is_flooded(
    page: ShadowPage, roots: Container[ShadowPage], loads: int, at: Mapping[int, ShadowPage]
) -> bool:
    """Whether so many writes (`page.flood`) without a use say that it is none any more.

    roots: those in use.  loads: of CR3, so far.  at: all pages by hpa.  What leads to the page is
    looked for after 8, 16, 32 … writes.
    """
    writes, since = page.flood, page.since
    if writes == 1:
        page.since = loads
    if writes < FEW:
        return False
    if writes > MOST:
        return True
    if writes & writes - 1:
        return False
    page.since = loads
    return not is_reached(page, roots, since, at)


def is_reached(
    page: ShadowPage, roots: Container[ShadowPage], since: int, at: Mapping[int, ShadowPage]
) -> bool:
    """Whether entries lead there from one of `roots`, or one loaded after load number `since`."""
    seen, left = {page.hpa}, [page]
    while left:
        page = left.pop()
        if page in roots or (page.is_root and page.loaded > since):
            return True
        for hpa in {slot & -PAGE for slot in page.parents} - seen:
            seen.add(hpa)
            left.append(at[hpa])
    return False
