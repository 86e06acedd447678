"""Shadow tables that mirror the guest's, table by table: what `eager` and `lazy` share.

Idea: each table of the guest that is in use has a shadow, which names the shadows of the tables
below it and, at the end, host frames.  Address spaces that share a table share its shadow, and an
address space that is not loaded keeps its shadows.  The guest's tables are write-protected
("traced") while they have shadows.  Source: lecture, "A reminder on shadow page tables".

Each level carries the rights of the guest's entry of that level; the processor combines them as
it would the guest's.  A large page of the guest becomes a 2-MByte one if the p2m has one behind it
and no table lies in it, else a *direct* table, which mirrors none and maps frames in a row.
Invariants: an entry exists only if the guest's was present and accessed when it was last seen,
and allows writes to a page only if it was dirty and the frame is not traced.
"""

from abc import abstractmethod
from typing import Annotated, Any, Final

from understudy.arch.address import MAXPHYADDR, PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging import BUDGET, Answer
from understudy.paging.guest_walk import (
    ACCESSED,
    DIRTY,
    E_WRITE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    Found,
    frame_of,
)
from understudy.paging.portable import Gfns
from understudy.paging.quadrants import COMPOSED, DIRECT, direct, key_of, stands_for
from understudy.paging.reverse_map import BLOCK
from understudy.paging.roots import RootKey, root_key, saved_root
from understudy.paging.shadow import HIDDEN, Shadow
from understudy.paging.shadow_pages import ENTRY_BYTES, ShadowPage, ShadowPages
from understudy.paging.untrace import is_entry_write, is_flooded
from understudy.state import restore

ROOTS_KEPT: Final = 64
NOW_AND_THEN: Final = 0xFF  # so many more entries may be kept before anybody looks
READ_ONLY: Final = USER | NO_EXECUTE
RIGHTS: Final = READ_ONLY | WRITABLE
USED: Final = PRESENT | ACCESSED
ALL_RIGHTS: Final = USED | DIRTY | WRITABLE | USER
Place = tuple[ShadowPage, int]
"""An entry: its table, and which one it is."""


class Mirror(Shadow):
    """The shadows of one VM's tables."""

    headroom = Shadow.headroom + NOW_AND_THEN * ENTRY_BYTES

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.tables = ShadowPages(self, self.may_write)
        self.traced: dict[int, list[ShadowPage]] = self.tables.traced
        self.stepped: list[int] = []  # gpa of a traced write that the processor makes by itself
        self.roots: dict[RootKey, ShadowPage] = {}  # the one loaded last comes last
        self.root = ShadowPage(0, 0, COMPOSED, 0)
        p2m.tracers.append(self)

    # --- events ---

    def mode_change(self) -> None:
        self.finish_step()
        old = self.regime
        self.read_regime()
        if (old.format, old.nx) != (self.regime.format, self.regime.nx):
            self.tables.clear()
            self.roots.clear()
        self.cr3_write()

    def cr3_write(self) -> None:
        self.finish_step()
        self.read_regime()
        self.synchronize()
        self.make_room()
        self._load_root()
        self.invalidate()
        self.tables.take_stale(self.root)

    def invlpg(self, gva: int) -> None:
        self.finish_step()
        self.devices.clear()
        self.synchronize()
        self.settle()

    def flush(self) -> None:
        self.flushes += 1
        self.finish_step()
        self.devices.clear()
        self.synchronize()
        self.settle()

    def p2m_change(self, runs: Runs) -> None:
        self.finish_step()
        self.forget_hpas(runs)
        self.tables.p2m_change(runs)
        self.settle()

    def synchronize(self) -> None:
        """A synchronization point: from now on the guest expects its tables to be believed."""

    @abstractmethod
    def may_write(self, gfn: int) -> bool:
        """Whether entries may let the guest write this frame."""

    @abstractmethod
    def trace(self, gva: int, error: int, found: Found) -> Answer:
        """The guest writes to a traced table."""

    @abstractmethod
    def table_written(self, gpa: int, length: int) -> None:
        """The hypervisor has written to a traced table (inside one page)."""

    def settle(self) -> None:
        """Tell the processors if entries have gone."""
        tables = self.tables
        if tables.stale or tables.is_stale:
            addresses = tables.take_stale(self.root)
            if addresses is None:
                self.invalidate()
            else:
                self.invalidate_pages(addresses)

    # --- faults ---

    def fill(self, gva: int, error: int, found: Found, hpa: int) -> Answer:
        if error & E_WRITE:
            if not self.may_write(found.gpa >> PAGE_SHIFT):
                return self.trace(gva, error, found)
            if not found.rights & WRITABLE:  # CR0.WP is 0
                return self.step(gva, error, found)
        self.fills += 1
        self.make_room()
        self.enter(gva, error, found)
        self.settle()
        return HIDDEN

    def fill_slot(
        self, slot: int, gfn: int, hpa: int, entry: int, rights: int, no_execute: int, error: int
    ) -> bool:
        if error & E_WRITE and not self.may_write(gfn):
            return False
        if not self.fills & NOW_AND_THEN and self.kept_bytes() > self.limit:
            return False
        self.tables.at[slot & -PAGE].flood = 0
        self.tables.map(slot, gfn, entry)
        self.settle()
        return True

    def enter(self, gva: int, error: int, found: Found) -> list[Place]:
        """Make the entries that a walk asks for; where they are, from the root down."""
        tables, page = self.tables, self.root
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
            page.flood, page.used = 0, self.fills
            if quadrant == COMPOSED:
                child, flags = self._below_root(index), PRESENT
            elif quadrant < 0:
                frame = page.gfn + (index << 9 * (level - 1))
                if level == 1 or (level == 2 and tables.may_be_large(frame)):
                    tables.map(slot, frame, ALL_RIGHTS | key_of(quadrant), level == 2)
                    return places
                child, flags = tables.page(frame, level - 1, quadrant), ALL_RIGHTS
            else:
                depth += 1
                entry, is_page = path[depth], depth == len(path) - 1
                frame = self._frame(level, index, entry, is_page)
                if is_page and (level == 1 or (level == 2 and tables.may_be_large(frame))):
                    tables.map(slot, frame, entry, level == 2)
                    if level == 1:
                        self.note_region(gva, found, page.hpa)
                    return places
                child, flags = self._below(level, index, entry, frame, is_page)
            tables.link(slot, child, flags)
            page = child

    def _below_root(self, index: int) -> ShadowPage:
        """What an entry of a PAE root names: the guest's directory, a quarter of it, or RAM."""
        regime = self.regime
        if regime.format is None:
            return self.tables.page(index << 18, 2, DIRECT)
        if regime.is_pae:
            assert regime.pdptes is not None
            directory = (regime.pdptes[index] & regime.address_mask) >> PAGE_SHIFT
            return self.tables.page(directory, 2, 0)
        return self.tables.page(regime.root >> PAGE_SHIFT, 2, index)

    def _frame(self, level: int, index: int, entry: int, is_page: bool) -> int:
        """The frame that a guest's entry means to this entry of ours."""
        if self.regime.entry_bytes == 8 or not is_page or level == 1:
            gfn = (entry & self.regime.address_mask) >> PAGE_SHIFT
            return gfn & -(1 << 9 * (level - 1)) if is_page else gfn
        large = frame_of(entry, 22, 4)  # IA-32: half of 4 MBytes
        return (large >> PAGE_SHIFT) + (index & 1) * BLOCK

    def _below(
        self, level: int, index: int, entry: int, frame: int, is_page: bool
    ) -> tuple[ShadowPage, int]:
        """The table that stands for what a guest's entry names, and the rights to it."""
        if is_page:  # a large one, in pieces
            rights = entry & (RIGHTS if entry & DIRTY else READ_ONLY)
            return self.tables.page(frame, level - 1, direct(entry)), USED | rights
        half = index & 1 if self.regime.entry_bytes == 4 else 0
        return self.tables.page(frame, level - 1, half), USED | entry & RIGHTS

    # --- roots ---

    def _load_root(self) -> None:
        """Translate by the shadow of the address space that CR3 names."""
        key = root_key(self.regime)
        root = self.roots.pop(key, None)
        if root is None:
            root = self._new_root(key)
            self.flushes += 1  # it begins empty
        root.flood, root.loaded, root.used = 0, self.root.loaded + 1, self.fills
        self.roots[key] = self.root = root
        while len(self.roots) > ROOTS_KEPT:
            self._forget(next(iter(self.roots)))
        self.use_root(root.hpa)

    def _new_root(self, key: RootKey) -> ShadowPage:
        if self.is_long:
            root = self.tables.page(key[0], 4, 0)
        else:
            number = 1 + max((page.gfn for page in self.roots.values()), default=0)
            root = self.tables.page(number, 3, COMPOSED)
        root.is_root = True
        return root

    def _forget(self, key: RootKey) -> None:
        root = self.roots.pop(key)
        root.is_root = False
        self.tables.release(root)

    # --- the budget ---

    def kept_bytes(self) -> int:
        return self.tables.kept_bytes()

    def evict(self, target: int) -> None:
        super().finish_step()
        self.regions.clear()
        before = len(self.tables.pages)
        for page in sorted(self.tables.pages.values(), key=lambda page: page.used):
            if self.kept_bytes() <= target:
                break
            if page.hpa and page is not self.root:  # else it has gone with another
                self._drop(page)
                self.drain()
        self.evictions += before - len(self.tables.pages)
        self.settle()

    # --- frames that are tables no more ---

    def note_write(self, gfn: int, offset: int, length: int) -> None:
        """A traced frame is written: stop tracing it if that memory is likely something else."""
        is_entry = is_entry_write(offset, length, self.regime.entry_bytes)
        for page in list(self.traced.get(gfn, ())):
            page.flood += 1
            if page.hpa and (not is_entry or is_flooded(page, self.root, self.tables.at)):
                self._drop(page)

    def _drop(self, page: ShadowPage) -> None:
        """Let a shadow go, whatever names it; but not the one that CR3 names."""
        super().finish_step()  # what is put back then must still be there
        if page is self.root:
            page.flood = 0
            return
        if page.is_root:
            self._forget_root(page)
        while page.parents:
            slot = next(iter(page.parents))
            self.tables.zap(slot)
            owner = self.tables.at.get(slot & -PAGE)
            if owner is None or owner.quadrant != COMPOSED or owner is self.root:
                continue
            if not self.tables.present(owner):
                self._forget_root(owner)

    def _forget_root(self, page: ShadowPage) -> None:
        for key in [key for key, root in self.roots.items() if root is page]:
            self._forget(key)

    # --- entries ---

    def resync(self, page: ShadowPage, index: int) -> None:
        """Make one entry of a shadow what the guest's entry is now, if it exists."""
        slot, level = page.hpa + 8 * index, page.level
        entry = self._guest_entry(page, index)
        if level == 1:
            if entry & USED == USED and not entry & self.leaf_reserved:
                if not self.read_u64(slot) and self.kept_bytes() > self.limit:
                    return  # a fault will make it
                self.tables.map(slot, (entry & self.regime.address_mask) >> PAGE_SHIFT, entry)
            elif self.read_u64(slot):
                self.tables.zap(slot)
            return
        old = self.read_u64(slot)
        is_page = self.regime.maps(level, entry)
        if entry & USED != USED or self.regime.is_reserved(level, entry, is_page):
            if old:
                self.tables.zap(slot)
            return
        if old:
            frame = self._frame(level, index, entry, is_page)
            child = self.tables.links.get(slot)
            if child is None:  # a large page of ours
                if is_page and level == 2 and self.tables.may_be_large(frame):
                    self.tables.map(slot, frame, entry, is_large=True)
                else:
                    self.tables.zap(slot)
            elif child.gfn == frame and stands_for(child.quadrant, entry, is_page):
                rights = entry & (RIGHTS if not is_page or entry & DIRTY else READ_ONLY)
                self.tables.link(slot, child, USED | rights)
            else:
                self.tables.zap(slot)

    def _guest_entry(self, page: ShadowPage, index: int) -> int:
        gpa, size = page.gfn << PAGE_SHIFT, self.regime.entry_bytes
        if size == 8:
            return self.read_entry(gpa + 8 * index, 8)
        if page.level == 1:
            return self.read_entry(gpa + 4 * (page.quadrant * 512 + index), 4)
        return self.read_entry(gpa + 4 * (page.quadrant * 256 + index // 2), 4)

    # --- one instruction through ---

    def step(self, gva: int, error: int, found: Found) -> Answer:
        """Let one instruction write where the entries do not allow it."""
        self.fills += 1
        self.make_room()
        places = self.enter(gva, error, found)
        self.settle()
        if not self.is_long:
            del places[0]  # a PDPTE has no rights
        self.patch([(page.hpa + 8 * index, WRITABLE) for page, index in places])
        return HIDDEN

    def single_step(self, gva: int, error: int) -> None:
        found = self.regime.walk(self.read_entry, gva, error)
        self.stepped.append(found.gpa)
        self.step(gva, error, found)

    def finish_step(self) -> None:
        super().finish_step()
        while self.stepped:
            gpa = self.stepped.pop()
            self.table_written(gpa & -PAGE, PAGE)

    # --- snapshots ---

    def save_tables(self, gfns: Gfns) -> dict[str, Any]:
        return {
            "pages": self.tables.save(gfns),
            "stepped": self.stepped,
            "roots": [[list(key), list(root.key)] for key, root in self.roots.items()],
            "root": list(self.root.key),
        }

    def load_tables(self, saved: dict[str, Any]) -> None:
        self.tables.clear()
        self.stepped = restore(list[Annotated[int, MAXPHYADDR]], saved["stepped"], "stepped")
        self.tables.load(saved["pages"])
        pages = self.tables.pages
        roots = dict(saved_root(self.regime, root) for root in saved["roots"])
        self.roots = {key: pages[page] for key, page in roots.items()}
        self.root = pages[tuple(saved["root"])]
        if self.roots.get(root_key(self.regime)) is not self.root:
            raise ValueError("snapshot: the root in use is not that of the guest's address space")
        self.use_root(self.root.hpa)
        self.invalidate()

    def name_table(self, hpa: int) -> list[int]:
        return list(self.tables.at[hpa].key)

    def named_table(self, name: list[int]) -> int:
        gfn, level, quadrant = name
        return self.tables.pages[gfn, level, quadrant].hpa

    def frames(self) -> list[int]:
        tables = [*self.pool, *(page.hpa for page in self.tables.pages.values())]
        return sorted(table >> PAGE_SHIFT for table in tables)
