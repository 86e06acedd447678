"""Shadow tables that mirror the guest's, table by table: what `eager` and `lazy` share.

Idea: each table of the guest that is in use has a shadow, which names the shadows of the tables
below it and, at the end, host frames.  Address spaces that share a table share its shadow, and an
address space that is not loaded keeps its shadows.  The guest's tables are write-protected
("traced") while they have shadows.  Source: lecture, "A reminder on shadow page tables".

Each level carries the rights of the guest's entry of that level; the processor combines them as
it would the guest's.  A large page of the guest becomes a 2-MByte one if the p2m has one behind it
and no table lies in it, else a *direct* table, which mirrors none and maps frames in a row.
Shadows belong to the VM: processors that load the same address space have the same root.

Invariants: an entry exists only if the guest's was present and accessed when it was last seen,
and allows writes to a page only if it was dirty and the frame is not traced.
"""

from abc import abstractmethod
from collections.abc import Container
from typing import Annotated, Any, Final

from understudy.arch.address import MAXPHYADDR, PAGE, PAGE_SHIFT
from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging import BUDGET, Answer
from understudy.paging.entering import READ_ONLY, RIGHTS, USED, Place, enter, named_frame
from understudy.paging.guest_walk import DIRTY, E_KEY, E_WRITE, WRITABLE, Found
from understudy.paging.quadrants import COMPOSED, stands_for
from understudy.paging.roles import ROLES, Role
from understudy.paging.roots import Roots, root_key, saved_root
from understudy.paging.shadow import Shadow
from understudy.paging.shadow_page import ShadowPage, indices
from understudy.paging.shadow_pages import ShadowPages
from understudy.paging.untrace import is_entry_write, is_flooded
from understudy.paging.unwatched import Unwatched
from understudy.paging.view import HIDDEN, ShadowView
from understudy.state import restore

NO_ROOT: Final = ShadowPage(0, 0, COMPOSED, ROLES[0], 0)


class MirrorView(ShadowView):
    """One processor's: which root it has loaded."""

    def __init__(self, mirror: "Mirror", guest: Guest) -> None:
        super().__init__(mirror, guest, mirror.theirs, mirror.real_mode, mirror.lent)
        self.shadow, self.tables = mirror, mirror.tables
        self.number = len(mirror.views)
        self.root = NO_ROOT
        self.stepped: list[int] = []  # gpa of a traced write that the processor makes by itself

    # --- events ---

    def begin_turn(self) -> None:
        self.shadow.begin_turn(self)

    def mode_change(self) -> None:
        if self.real is not None:
            return
        self.finish_step()
        old = self.role
        self.read_regime()
        if old is not self.role:
            self.root = NO_ROOT
            self.shadow.leave_role(old)
        self.cr3_write()

    def cr3_write(self) -> None:
        self.finish_step()
        self.read_regime()
        self.shadow.synchronize()
        self.shadow.make_room()
        self.root = self.shadow.load_root(self)
        self.guest.load_root(self.root.hpa)
        self.guest.invalidate()
        self.shadow.settle(besides=self)

    def note_real(self) -> None:
        self.root = NO_ROOT
        self.shadow.unwatched.change(self.number, is_seen=self.real is None)

    def invlpg(self, gva: int) -> None:
        self.synchronize()

    def flush(self) -> None:
        self.shadow.flushes += 1
        self.synchronize()

    def synchronize(self) -> None:
        """From now on this processor expects the guest's tables to be believed."""
        self.finish_step()
        self.devices.clear()
        self.shadow.synchronize()
        self.shadow.settle()

    # --- faults ---

    def fill(self, gva: int, error: int, found: Found, hpa: int) -> Answer:
        shadow = self.shadow
        if error & E_WRITE:
            if not shadow.may_write(found.gpa >> PAGE_SHIFT):
                return shadow.trace(self, gva, error, found)
            if error & E_KEY or not found.rights & WRITABLE:  # CR0.WP is 0
                return self.step(gva, error, found)
        shadow.fills += 1
        shadow.make_room()
        self.enter(gva, error, found)
        shadow.settle()
        return HIDDEN

    def fill_slot(
        self, slot: int, gfn: int, hpa: int, entry: int, rights: int, no_execute: int, error: int
    ) -> bool:
        shadow, tables = self.shadow, self.tables
        page = tables.at[slot & -PAGE]
        if shadow.unsync:
            shadow.note_entered([(page, (slot & PAGE - 1) >> 3)])
        if error & E_WRITE and not shadow.may_write(gfn):
            return False
        page.flood = 0
        tables.map(slot, gfn, entry)
        shadow.settle()
        return True

    def enter(self, gva: int, error: int, found: Found) -> list[Place]:
        """Make the entries that a walk asks for; where they are, from the root down."""
        shadow = self.shadow
        places = enter(self.tables, self.root, self.regime, gva, error, found, shadow.fills)
        last, _ = places[-1]
        if last.level == 1 and last.quadrant >= 0:
            self.note_region(gva, found, last.hpa)
        if shadow.unsync:
            shadow.note_entered(places)
        return places

    # --- one instruction through ---

    def step(self, gva: int, error: int, found: Found) -> Answer:
        """Let one instruction write where the entries do not allow it."""
        self.shadow.fills += 1
        self.shadow.make_room()
        places = self.enter(gva, error, found)
        if not self.shadow.may_write(found.gpa >> PAGE_SHIFT):  # perhaps since it was entered
            self.stepped.append(found.gpa)
        self.shadow.settle()
        if not self.role.is_long:
            del places[0]  # a PDPTE has no rights
        self.lend([page.hpa + 8 * index for page, index in places], gva, error, found)
        return HIDDEN

    def single_step(self, gva: int, error: int) -> None:
        self.step(gva, error, self.regime.walk(self.read_entry, gva, error))

    def finish_step(self) -> None:
        self.put_back()
        while self.stepped:
            gpa = self.stepped.pop()
            self.shadow.table_written(gpa & -PAGE, PAGE)

    # --- snapshots ---

    def root_key(self) -> list[int]:
        """The key of the root that is loaded; nothing if none is."""
        return [] if self.root is NO_ROOT else list(self.root.key)

    def name_table(self, hpa: int) -> list[int]:
        return list(self.tables.at[hpa].key)

    def named_table(self, name: list[int]) -> int:
        gfn, level, quadrant, role = name
        return self.tables.pages[gfn, level, quadrant, role].hpa


class Mirror(Shadow[MirrorView]):
    """The shadows of one VM's tables."""

    unsync: Container[int] = ()  # frames of tables that shadows may differ from

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.tables = ShadowPages(self, self.may_write)
        self.traced: dict[int, list[ShadowPage]] = self.tables.traced
        self.roots = Roots(self.tables, self.roots_in_use)
        self.unwatched = Unwatched(self.traced, self.theirs.read_page, self.table_written)
        p2m.tracers.append(self)

    def new_view(self, guest: Guest) -> MirrorView:
        return MirrorView(self, guest)

    def begin_turn(self, view: MirrorView) -> None:
        """It is going to execute, perhaps after another."""
        for other in self.views:
            if other is not view and other.is_watched:
                other.finish_step()
        self.unwatched.begin_turn(view.number, is_seen=view.real is None)
        if view.real is None and view.root is NO_ROOT:
            view.mode_change()  # who executes has a root

    # --- events ---

    def p2m_change(self, runs: Runs) -> None:
        self.finish_steps()
        self.forget(runs)
        self.tables.p2m_change(runs)
        self.settle()

    def synchronize(self) -> None:
        """A synchronization point: from now on the guest expects its tables to be believed."""

    @abstractmethod
    def trace(self, view: MirrorView, gva: int, error: int, found: Found) -> Answer:
        """The guest writes to a traced table."""

    @abstractmethod
    def table_written(self, gpa: int, length: int) -> None:
        """The hypervisor has written to a traced table (inside one page)."""

    def apply(self, gpa: int, length: int) -> None:
        """What a traced table has now, inside one page, the shadows have, too."""
        for page in list(self.traced.get(gpa >> PAGE_SHIFT, ())):
            for index in indices(page, gpa & PAGE - 1, length):
                if page.hpa:  # else it has gone with what it hung from
                    self.resync(page, index)

    def note_entered(self, places: list[Place]) -> None:
        """Entries were made while some shadows may differ from their tables."""

    def settle(self, besides: MirrorView | None = None) -> None:
        """Tell the processors if entries have gone, but for one that has forgotten all."""
        tables = self.tables
        if tables.stale or tables.is_stale:
            stale = tables.take_stale()
            for view in self.views:
                if view is not besides and view.root is not NO_ROOT:
                    self.tell(view, stale)

    def tell(self, view: MirrorView, stale: set[int] | None) -> None:
        """Make a processor forget what it may keep of these entries; None: of all."""
        addresses = None if stale is None else self.tables.pages_at(stale, view.root)
        if addresses != []:
            view.guest.invalidate(addresses)

    # --- roots ---

    def load_root(self, view: MirrorView) -> ShadowPage:
        """The shadow of the address space that a processor's CR3 names."""
        root, is_new = self.roots.load(root_key(view.regime, view.role), view.role, self.fills)
        self.flushes += is_new  # it begins empty
        return root

    def roots_in_use(self) -> list[ShadowPage]:
        """Those that processors have loaded."""
        return [view.root for view in self.views]

    def leave_role(self, role: Role) -> None:
        """A processor reads tables so no more: if none does, there are no such shadows."""
        if all(view.root is NO_ROOT or view.role is not role for view in self.views):
            self.tables.clear_role(role)
            self.roots.clear(role)

    # --- the budget ---

    def kept_bytes(self) -> int:
        return self.tables.kept_bytes()

    def evict(self, target: int) -> None:
        self.put_back()
        self.forget_regions()
        before, in_use = len(self.tables.pages), self.roots_in_use()
        for page in sorted(self.tables.pages.values(), key=lambda page: page.used):
            if self.kept_bytes() <= target:
                break
            if page.hpa and page not in in_use:  # else it has gone with another
                self._drop(page)
                self.drain()
        self.evictions += before - len(self.tables.pages)
        self.settle()

    # --- frames that are tables no more ---

    def note_write(self, gfn: int, offset: int, length: int) -> None:
        """A traced frame is written: stop tracing it if that memory is likely something else."""
        roots = self.roots_in_use()
        for page in list(self.traced.get(gfn, ())):
            page.flood += 1
            is_entry = is_entry_write(offset, length, page.role.entry_bytes)
            if page.hpa and (
                not is_entry or is_flooded(page, roots, self.roots.loads, self.tables.at)
            ):
                self._drop(page)

    def _drop(self, page: ShadowPage) -> None:
        """Let a shadow go, whatever names it; but not one that a CR3 names."""
        self.put_back()  # what is put back then must still be there
        in_use = self.roots_in_use()
        if page in in_use:
            page.flood = 0
            return
        if page.is_root:
            self.roots.forget(page)
        while page.parents:
            slot = next(iter(page.parents))
            self.tables.zap(slot)
            owner = self.tables.at.get(slot & -PAGE)
            if owner is None or owner.quadrant != COMPOSED or owner in in_use:
                continue
            if not self.tables.present(owner):
                self.roots.forget(owner)

    # --- entries ---

    def resync(self, page: ShadowPage, index: int) -> None:
        """Make one entry of a shadow what the guest's entry is now, if it exists."""
        entry = self._guest_entry(page, index)
        if not page.hpa:  # something left for the guest's table, and the page with it
            return
        slot, level, role = page.hpa + 8 * index, page.level, page.role
        if level == 1:
            if entry & USED == USED and not entry & role.leaf_reserved:
                if not self.read_u64(slot) and self.is_over:
                    return  # a fault will make it
                self.tables.map(slot, (entry & role.address_mask) >> PAGE_SHIFT, entry)
            elif self.read_u64(slot):
                self.tables.zap(slot)
            return
        old = self.read_u64(slot)
        is_page = role.regime.maps(level, entry)
        if entry & USED != USED or role.regime.is_reserved(level, entry, is_page):
            if old:
                self.tables.zap(slot)
            return
        if old:
            frame = named_frame(role, level, index, entry, is_page)
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
        gpa, size = page.gfn << PAGE_SHIFT, page.role.entry_bytes
        if size == 8:
            return self.read_entry(gpa + 8 * index, 8)
        if page.level == 1:
            return self.read_entry(gpa + 4 * (page.quadrant * 512 + index), 4)
        return self.read_entry(gpa + 4 * (page.quadrant * 256 + index // 2), 4)

    # --- snapshots ---

    def save_tables(self) -> dict[str, Any]:
        return {
            "pages": self.tables.save(),
            "stepped": [view.stepped for view in self.views],
            "roots": [[list(key), list(root.key)] for key, root in self.roots.by_key.items()],
            "in_use": [view.root_key() for view in self.views],
            "loads": self.roots.loads,
            "unwatched": self.unwatched.save(),
        }

    def load_tables(self, saved: dict[str, Any]) -> None:
        self.tables.clear()
        self.roots.loads = restore(int, saved["loads"], "loads")
        self.tables.load(saved["pages"])
        pages = self.tables.pages
        roots = dict(saved_root(root) for root in saved["roots"])
        self.roots.by_key = {key: pages[page] for key, page in roots.items()}
        if not all(root.is_root for root in self.roots.by_key.values()):
            raise ValueError("snapshot: a root of shadow tables that would not be kept")
        stepped = restore(list[list[Annotated[int, MAXPHYADDR]]], saved["stepped"], "stepped")
        in_use = restore(list[tuple[int, ...]], saved["in_use"], "roots in use")
        for view, gpas, root in zip(self.views, stepped, in_use, strict=True):
            view.stepped = gpas
            self._load_view(view, root)
        self.unwatched.load(saved["unwatched"])

    def _load_view(self, view: MirrorView, key: tuple[int, ...]) -> None:
        view.root = NO_ROOT
        if key:
            root = self.roots.by_key.get(root_key(view.regime, view.role))
            if root is None or root.key != key or view.real is not None:
                raise ValueError("snapshot: the root in use is of another address space")
            view.root = root
            view.guest.load_root(root.hpa)
        view.guest.invalidate()

    def frames(self) -> list[int]:
        tables = [*self.pool, *(page.hpa for page in self.tables.pages.values())]
        return sorted([table >> PAGE_SHIFT for table in tables] + self.real_mode.frames())
