"""One shadow page: a table of ours, and what it stands for.

Source: what KVM's documentation of its shadow MMU calls a shadow page.
Invariant: two pages with the same key do not exist beside each other.
"""

from typing import NamedTuple

from understudy.paging.quadrants import LOWEST
from understudy.paging.roles import ROLES, Role

Key = tuple[int, int, int, int]


class SavedPage(NamedTuple):
    """One of them, as a snapshot keeps it."""

    gfn: int
    level: int
    quadrant: int
    role: int
    is_root: bool
    flood: int
    since: int
    loaded: int
    used: int
    maps: str  # packed
    links: list[tuple[int, int, int]]  # which entry, the place of what it names, flags

    @property
    def is_possible(self) -> bool:
        """Tables of that role have that level, and such parts."""
        if not 0 <= self.role < len(ROLES) or not 0 < self.level <= 4:
            return False
        form = ROLES[self.role].regime.format
        most = 0 if form is None else len(form.levels)
        return LOWEST <= self.quadrant < (4 if self.level <= most else 0)


class ShadowPage:
    """One table of ours.

    `gfn` is the guest's table that it mirrors, or the first frame that it maps (`DIRECT`).
    `hpa` is 0 once it is freed.  `quadrant`: which part of an IA-32 table, whose entries cover
    more than ours.  `role`: how the guest's entries are read.
    """

    __slots__ = (
        "flood", "gfn", "hpa", "is_root", "level", "loaded", "parents", "quadrant", "role", "since",
        "used",
    )  # fmt: skip

    def __init__(self, gfn: int, level: int, quadrant: int, role: Role, hpa: int) -> None:
        self.gfn, self.level, self.quadrant, self.role, self.hpa = gfn, level, quadrant, role, hpa
        self.parents: set[int] = set()  # slots that name it
        self.is_root = False  # a load of CR3 may want it again
        self.flood = 0  # writes to the guest's table since a fault went through it
        self.since = 0  # loads of CR3 when that was last asked what it means
        self.loaded = 0  # of a root: which load of CR3 was its last
        self.used = 0  # the number of the last fault that needed it

    @property
    def key(self) -> Key:
        """By which `ShadowPages.pages` finds it."""
        return self.gfn, self.level, self.quadrant, self.role.number


def indices(page: ShadowPage, offset: int, length: int) -> range:
    """The entries of a shadow that stand for these bytes of the guest's table."""
    if page.role.entry_bytes == 8:
        return range(offset >> 3, (offset + length + 7) >> 3)
    first, after, quadrant = offset >> 2, (offset + length + 3) >> 2, page.quadrant
    per_page, each = (512, 1) if page.level == 1 else (256, 2)
    begin, end = quadrant * per_page, (quadrant + 1) * per_page
    if first < begin:
        first = begin
    if after > end:
        after = end
    return range((first - begin) * each, (after - begin) * each)
