"""What a shadow page stands for: a part of a guest's table, or none.

An IA-32 table has 1024 entries and each of ours 512, so a guest's table has up to four shadows: 0
to 3 say which part.  The other shadows mirror no table.

Source: KVM's documentation of its shadow MMU ("quadrant", "direct"); SDM 3A, "Protection Keys".
Invariant: only the entries that map pages have keys, so the pieces of a guest's large page need a
table of their own for each key.
"""

from typing import Final

from understudy.paging.guest_walk import KEY, KEY_SHIFT

DIRECT: Final = -1  # mirrors none: maps frames that lie side by side
COMPOSED: Final = -2  # a PAE root: its four entries are made from registers
KEYS: Final = 15
LOWEST: Final = COMPOSED - KEYS
"""Below `COMPOSED`, for each key but 0: as `DIRECT`, with that key in the entries."""


def direct(entry: int) -> int:
    """That of a table whose entries map what a guest's entry maps, with its key."""
    key = (entry & KEY) >> KEY_SHIFT
    return COMPOSED - key if key else DIRECT


def key_of(quadrant: int) -> int:
    """The protection key of such a table's entries, where an entry has it."""
    return max(COMPOSED - quadrant, 0) << KEY_SHIFT


def stands_for(quadrant: int, entry: int, is_page: bool) -> bool:
    """Whether such a table can be what a guest's entry names."""
    return quadrant == direct(entry) if is_page else quadrant >= 0
