"""Shadow pages: tables of ours, which of them name which, and which guest frames are traced.

Source: lecture, "How can the VMM detect the accesses to PTs by the guest OSes?"; what KVM's
documentation of its shadow MMU calls shadow pages, parents and the reverse map.

Invariants: a page without parents that is no root is freed; a guest frame is traced exactly while
it has shadow pages, and then no entry lets it be written but one made while `may_write` said so;
an entry that has gone, or allows less, and that a processor may keep, is in `stale` if it maps a
page; if it names a table, `is_stale` is set.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from understudy.arch.address import PAGE
from understudy.machine.frame_table import MOST
from understudy.machine.p2m import Runs
from understudy.paging.budget import TABLE_BYTES
from understudy.paging.guest_walk import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    KEY,
    LARGE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
)
from understudy.paging.portable import FLAGS, packed, unpacked
from understudy.paging.quadrants import COMPOSED
from understudy.paging.reverse_map import BLOCK, ENTRY_BYTES, ReverseMap
from understudy.paging.roles import ROLES, Role
from understudy.paging.shadow_page import Key, SavedPage, ShadowPage
from understudy.state import plain, restore

if TYPE_CHECKING:
    from understudy.paging.shadow import Shadow

FEW: Final = 16  # slots, and addresses: with more it costs less to forget all and walk again
MOST_STEPS: Final = 64  # from a slot up to the root
MOST_PARENTS: Final = 512  # of a table, to be looked at one by one
NOT_LOW: Final = 0xFFFF << 48


class ShadowPages:
    """All of one VM.  `may_write(gfn)`: whether entries may let the guest write a frame now."""

    def __init__(self, shadow: "Shadow[Any]", may_write: Callable[[int], bool]) -> None:
        self.shadow, self.may_write = shadow, may_write
        self.memory = shadow.memory
        self.read, self.write = shadow.memory.read_u64, shadow.memory.write_u64
        self.end_lending = shadow.end_lending
        self.pages: dict[Key, ShadowPage] = {}
        self.at: dict[int, ShadowPage] = {}  # by hpa
        self.traced: dict[int, list[ShadowPage]] = {}  # gfn of a guest's table -> its shadows
        self.traced_in: dict[int, int] = {}  # block of 512 frames -> how many of them are traced
        self.links: dict[int, ShadowPage] = {}  # slot -> the table that its entry names
        self.reverse = ReverseMap()
        self.stale: set[int] = set()  # slots
        self.is_stale = False

    def kept_bytes(self) -> int:
        """What all of them take, with what is noted of them; tables in the pool, too."""
        tables, entries = len(self.pages) + len(self.shadow.pool), len(self.reverse)
        return tables * TABLE_BYTES + (entries + len(self.links)) * ENTRY_BYTES

    # --- pages ---

    def page(self, gfn: int, level: int, quadrant: int, role: Role) -> ShadowPage:
        """The shadow of a guest's table, or a direct table; made if there is none."""
        key = gfn, level, quadrant, role.number
        if (page := self.pages.get(key)) is not None:
            return page
        table = self.shadow.new_table()
        page = self.pages[key] = ShadowPage(gfn, level, quadrant, role, table)
        self.at[page.hpa] = page
        if quadrant >= 0:
            self._note(page)
        return page

    def _note(self, page: ShadowPage) -> None:
        """One more shadow of this frame; with the first, it is not written any more."""
        gfn = page.gfn
        if (pages := self.traced.get(gfn)) is not None:
            pages.append(page)
            return
        self.traced[gfn] = [page]
        self.traced_in[gfn // BLOCK] = self.traced_in.get(gfn // BLOCK, 0) + 1
        self.protect(gfn)

    def protect(self, gfn: int) -> None:
        """Let no entry write this frame.  Large pages around it go, to come back in pieces."""
        for slot in self.reverse.small(gfn):
            self.end_lending(slot)
            entry = self.read(slot)
            if entry & WRITABLE:
                self.write(slot, entry & ~WRITABLE)
                self.stale.add(slot)
        for slot in list(self.reverse.large(gfn)):
            self.zap(slot)

    def release(self, page: ShadowPage) -> None:
        """Free a page that nothing names, unless it is a root."""
        if page.parents or page.is_root:
            return
        self.empty(page)
        del self.pages[page.key]
        self.shadow.pool.append(page.hpa)
        del self.at[page.hpa]
        page.hpa = 0
        if page.quadrant < 0:
            return
        pages = self.traced[page.gfn]
        pages.remove(page)
        if not pages:
            del self.traced[page.gfn]
            block = page.gfn // BLOCK
            self.traced_in[block] -= 1
            if not self.traced_in[block]:
                del self.traced_in[block]

    def empty(self, page: ShadowPage) -> None:
        """Drop all entries of a page."""
        words = memoryview(self.memory.read(page.hpa, PAGE)).cast("Q")
        for index, entry in enumerate(words):
            if entry:
                self.zap(page.hpa + 8 * index)

    def present(self, page: ShadowPage) -> list[int]:
        """The indices of the entries that there are."""
        words = memoryview(self.memory.read(page.hpa, PAGE)).cast("Q")
        return [index for index, entry in enumerate(words) if entry]

    def clear(self) -> None:
        """Forget everything, roots too."""
        self.shadow.put_back()
        self.shadow.forget_regions()
        for page in self.pages.values():
            self.shadow.pool.append(page.hpa)
            page.hpa = 0
        for table in (self.pages, self.at, self.traced, self.traced_in, self.links):
            table.clear()
        self.reverse.clear()
        self.is_stale = True

    def clear_role(self, role: Role) -> None:
        """Forget all tables that were read so."""
        mine = [page for page in self.pages.values() if page.role is role]
        if len(mine) == len(self.pages):
            self.clear()
            return
        for page in mine:
            page.is_root = False
        for page in mine:
            if page.hpa and not page.parents:  # all others go with what they hang from
                self.release(page)

    # --- entries ---

    def link(self, slot: int, page: ShadowPage, flags: int) -> None:
        """Make the entry at `slot` name a table."""
        self.end_lending(slot)
        entry = page.hpa | flags
        old = self.read(slot)
        if old == entry:
            return
        self.shadow.forget_regions()
        before = self.links.get(slot)
        if before is not page:
            self.links[slot] = page
            page.parents.add(slot)
            if old:
                self.is_stale = True
            if before is None:
                self.reverse.remove(slot)
            else:
                before.parents.discard(slot)
                self.release(before)
        elif _allows_less(old, entry):
            self.is_stale = True
        self.write(slot, entry)

    def map(self, slot: int, gfn: int, guest: int, is_large: bool = False) -> None:
        """Make the entry at `slot` map a frame with the rights of the guest's entry."""
        hpa = self.shadow.theirs.here(gfn)
        if not hpa:  # whoever uses it brings it back
            self.zap(slot)
            return
        entry = hpa | guest & (USER | NO_EXECUTE | KEY) | PRESENT | ACCESSED | DIRTY
        if is_large:
            entry |= LARGE
        p2m = self.shadow.p2m
        is_protected = not is_large and p2m.protected and p2m.is_protected(gfn)
        if guest & DIRTY and not is_protected and (is_large or self.may_write(gfn)):
            entry |= guest & WRITABLE
        self.end_lending(slot)
        old = self.read(slot)
        if old == entry:
            return
        if slot in self.links or (old and self.reverse.frame_at(slot) != gfn) or is_large:
            if old:
                self.zap(slot)
        elif old and _allows_less(old, entry):
            self.stale.add(slot)
        self.write(slot, entry)
        if is_large:
            self.reverse.add_large(slot, gfn)
        else:
            self.reverse.add(slot, gfn)

    def may_be_large(self, gfn: int) -> bool:
        """Whether one entry may map the 512 frames from this one on."""
        return gfn // BLOCK not in self.traced_in and bool(self.shadow.large_frame(gfn))

    def zap(self, slot: int) -> None:
        """Make the entry at `slot` not present."""
        self.end_lending(slot)
        self.write(slot, 0)
        page = self.links.pop(slot, None)
        if page is None:
            self.stale.add(slot)
            self.reverse.remove(slot)
            return
        self.is_stale = True
        self.shadow.forget_regions()
        page.parents.discard(slot)
        self.release(page)

    def p2m_change(self, runs: Runs) -> None:
        """These guest frames have moved, come or gone, or may be written or not any more."""
        p2m, traced = self.shadow.p2m, self.traced
        for gfn, count in runs:
            for slot in self.reverse.slots_in(gfn, count):
                self.zap(slot)
            frames = range(gfn, gfn + count)
            few = frames if count < len(traced) else traced
            for frame in [frame for frame in few if frame in frames and frame in traced]:
                if p2m.lookup(frame) is None:
                    for page in list(traced.get(frame, ())):
                        self.empty(page)

    # --- what processors must forget ---

    def take_stale(self) -> set[int] | None:
        """The slots that processors must forget; nothing, from now on.  None: everything."""
        stale, is_stale = self.stale, self.is_stale
        self.stale, self.is_stale = set(), False
        return None if is_stale or len(stale) > FEW else stale

    def pages_at(self, slots: Collection[int], root: ShadowPage) -> list[int] | None:
        """An address in each page that a walk from `root` translates by one of these entries.

        None if there are too many.
        """
        found: list[int] = []
        for slot in slots:
            addresses = self.addresses(slot, root)
            if addresses is None or len(found) + len(addresses) > FEW:
                return None
            found += addresses
        return found

    def addresses(self, slot: int, root: ShadowPage) -> list[int] | None:
        """The linear addresses that a walk from `root` translates by the entry at `slot`.

        One for each way that leads there; None if a guest has made too many ways to look at.
        """
        page = self.at[slot & -PAGE]
        left = [(page, (slot & PAGE - 8) << 9 * page.level)]
        found: list[int] = []
        for _ in range(MOST_STEPS):
            if not left:
                return found
            page, gva = left.pop()
            if page is root:
                found.append(gva | NOT_LOW if gva >> 47 else gva)
            elif len(page.parents) > MOST_PARENTS:
                return None
            elif page.level == root.level - 1:
                here = [parent for parent in page.parents if parent & -PAGE == root.hpa]
                left += [(root, gva | (parent & PAGE - 8) << 9 * root.level) for parent in here]
            else:
                shift = 9 * (page.level + 1)
                for parent in page.parents:
                    left.append((self.at[parent & -PAGE], gva | (parent & PAGE - 8) << shift))
        return None

    # --- snapshots ---

    def save(self) -> list[Any]:
        """Every page, what its entries map, and which pages they name, by place in this list."""
        places = {page.hpa: place for place, page in enumerate(self.pages.values())}
        saved: list[Any] = []
        for page in self.pages.values():
            words = memoryview(self.memory.read(page.hpa, PAGE)).cast("Q")
            maps: list[tuple[int, int]] = []
            links: list[tuple[int, int, int]] = []
            for index, entry in enumerate(words):
                child = self.links.get(page.hpa + 8 * index)
                if child is not None:
                    links.append((index, places[child.hpa], entry & ~ADDRESS))
                elif entry:
                    maps.append((index, entry))
            saved.append(plain(SavedPage(
                *page.key, page.is_root, page.flood, page.since, page.loaded, page.used,
                packed(page.hpa, maps, self.reverse), links,
            )))  # fmt: skip
        return saved

    def load(self, rows: list[Any]) -> None:
        """Make them anew.  ValueError if they cannot be tables of ours."""
        pages: list[ShadowPage] = []
        saved = restore(list[SavedPage], rows, "shadow pages")
        for row in saved:
            key = row.gfn, row.level, row.quadrant, row.role
            if not row.is_possible or not 0 <= row.gfn < MOST or key in self.pages:
                raise ValueError(f"snapshot: no shadow page is {key}")
            page = self.page(row.gfn, row.level, row.quadrant, ROLES[row.role])
            page.is_root, page.flood, page.since = row.is_root, row.flood, row.since
            page.loaded, page.used = row.loaded, row.used
            pages.append(page)
        for page, (*_, maps, links) in zip(pages, saved, strict=True):
            for index, gfn, flags in unpacked(maps, self.shadow.p2m):
                self._restore(page, index, gfn, flags)
            for index, place, flags in links:
                child = pages[place]
                known = PRESENT if page.quadrant == COMPOSED else FLAGS & ~(LARGE | KEY)
                if (
                    not 0 <= index < BLOCK or flags & ~known or not flags & PRESENT
                    or place < 0 or child.level != page.level - 1 or child.role is not page.role
                ):  # fmt: skip
                    raise ValueError(
                        f"snapshot: entry {index} of a shadow page names no table of it"
                    )
                self.link(page.hpa + 8 * index, child, flags)
        for page in pages:
            if not page.parents and not page.is_root:
                raise ValueError("snapshot: nothing leads to a shadow page")
        self.stale, self.is_stale = set(), True

    def _restore(self, page: ShadowPage, index: int, gfn: int, flags: int) -> None:
        """One entry that maps a page; left out where that cannot be any more."""
        slot = page.hpa + 8 * index
        is_large = bool(flags & LARGE) and page.level == 2
        if is_large and self.may_be_large(gfn):
            self.write(slot, self.shadow.large_frame(gfn) | flags)
            self.reverse.add_large(slot, gfn)
        elif page.level == 1 and not flags & LARGE:
            if not self.may_write(gfn):
                flags &= ~WRITABLE
            self.write(slot, self.shadow.look_up(gfn) | flags)
            self.reverse.add(slot, gfn)


def _allows_less(old: int, new: int) -> bool:
    """Whether a processor that keeps `old` could do what `new` refuses.

    A page that becomes a program's may be one that SMEP and SMAP refuse to the supervisor.
    """
    is_less = old & ~new & WRITABLE or new & ~old & NO_EXECUTE
    return bool(is_less or (old ^ new) & (USER | KEY))
