"""Virtual TLB: the shadow tables are a cache, refilled on faults.

Idea: an architectural TLB may be incomplete but never stale; so may we.  Source: lecture, "The
Virtual TLB approach".  Cost: one hidden fault for each page that is used after a load of CR3; no
exit when a guest edits its tables.

Each entry stands alone, as a TLB's does: it carries the rights of all levels of the guest's walk,
and the shadow's upper levels refuse nothing.  INVLPG takes out one page, a load of CR3 everything,
a frame that moves the entries that map it.  As a TLB, it belongs to one processor; only the budget
is the VM's.

Invariants: an entry was right when it was made, and the guest has not invalidated it since; the
tables may be discarded at any time.
"""

from typing import Any, Final

from understudy.arch.address import PAGE, PAGE_SHIFT, is_canonical
from understudy.guest import Guest
from understudy.machine.p2m import Runs
from understudy.paging import Answer
from understudy.paging.budget import TABLE_BYTES
from understudy.paging.guest_walk import (
    DIRTY,
    E_KEY,
    E_WRITE,
    KEY,
    LARGE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    Found,
)
from understudy.paging.portable import packed, unpacked
from understudy.paging.reverse_map import ENTRY_BYTES, ReverseMap
from understudy.paging.shadow import PAGE_ENTRY, TABLE, Shadow
from understudy.paging.view import HIDDEN, LARGE_SHIFT, ShadowView
from understudy.state import U62, restore

DIRECTORY_SHIFT: Final = 30
LARGE_SHIFTS: Final = (LARGE_SHIFT, LARGE_SHIFT + 1, DIRECTORY_SHIFT)  # of the guest's pages
POINTER_SHIFT: Final = 39


class VtlbView(ShadowView):
    """One processor's: the tables for the address space that it has loaded."""

    def __init__(self, vtlb: "Vtlb", guest: Guest) -> None:
        super().__init__(vtlb, guest, vtlb.theirs, vtlb.real_mode, vtlb.lent)
        self.shadow = vtlb
        self.root = vtlb.reserve.frame()
        self.used = 0  # the number of the last fault that was filled
        # The last ones of these are those that faults have needed last.
        self.pointers: dict[int, int] = {}  # gva >> 39 -> table (Intel 64 only)
        self.directories: dict[int, int] = {}  # gva >> 30 -> table
        self.leaves: dict[int, int] = {}  # gva >> 21 -> table
        self.pieces: set[tuple[int, int]] = set()  # guest's large pages that have smaller entries
        self.reverse = ReverseMap()

    # --- events ---

    def mode_change(self) -> None:
        if self.real is not None:
            return
        self.read_regime()
        self.guest.load_root(self.root)
        self.flush()

    def note_real(self) -> None:
        self.discard()

    def cr3_write(self) -> None:
        self.read_regime()
        self.flush()

    def flush(self) -> None:
        self.shadow.flushes += 1
        self.discard()

    def invlpg(self, gva: int) -> None:
        self.finish_step()
        self.regions.clear()
        self.devices.clear()
        had_pieces = False
        for shift in LARGE_SHIFTS:
            if (shift, gva >> shift) in self.pieces:
                self._drop_large(shift, gva >> shift)
                had_pieces = True
        slot = 0
        if (leaf := self.leaves.get(gva >> LARGE_SHIFT)) is not None:
            slot = leaf + (gva >> 9 & 0xFF8)
        elif (directory := self.directories.get(gva >> DIRECTORY_SHIFT)) is not None:
            slot = directory + (gva >> 18 & 0xFF8)
        if slot and self.read_u64(slot):
            self._zap(slot)
        self.guest.invalidate(None if had_pieces else [gva])

    def fill_slot(
        self, slot: int, gfn: int, hpa: int, entry: int, rights: int, no_execute: int, error: int
    ) -> bool:
        own = hpa | PAGE_ENTRY | rights & USER | no_execute | entry & KEY
        if entry & DIRTY and not (self.p2m.protected and self.p2m.is_protected(gfn)):
            own |= rights & WRITABLE
        self._map(slot, gfn, own)
        return True

    def fill(self, gva: int, error: int, found: Found, hpa: int) -> Answer:
        self.shadow.fills += 1
        self.used = self.shadow.fills
        self.shadow.make_room()
        gfn = found.gpa >> PAGE_SHIFT
        entry = page_entry(hpa, found, error, may_write=not self.p2m.is_protected(gfn))
        slot = self._enter(gva, found, hpa, entry)
        if error & E_WRITE and (error & E_KEY or not found.rights & WRITABLE):  # CR0.WP is 0
            self.lend([slot], gva, error, found)
        return HIDDEN

    def _enter(self, gva: int, found: Found, hpa: int, entry: int) -> int:
        """Put an entry in; its slot."""
        key = gva >> LARGE_SHIFT
        if found.shift >= LARGE_SHIFT:
            large = self.theirs.large_frame(found.gpa >> PAGE_SHIFT)
            if found.shift > LARGE_SHIFT or not large:
                self.pieces.add((found.shift, gva >> found.shift))
            if large:
                if key in self.leaves:
                    self._free_leaf(key)
                    self.regions.pop(key, None)
                    self.guest.invalidate()  # the table will be another's
                slot = self._directory(gva) + (gva >> 18 & 0xFF8)
                self._map(slot, found.gpa >> PAGE_SHIFT, entry & ~hpa | large | LARGE)
                return slot
        leaf = self._leaf(gva)
        slot = leaf + (gva >> 9 & 0xFF8)
        self._map(slot, found.gpa >> PAGE_SHIFT, entry)
        if found.shift == PAGE_SHIFT:
            self.note_region(gva, found, leaf)
        return slot

    def p2m_change(self, runs: Runs) -> None:
        """Drop what maps these frames; what the processor keeps of an entry that has gone, too."""
        if self.directories:
            for gfn, count in runs:
                for slot in self.reverse.slots_in(gfn, count):
                    self._zap(slot)
            self.guest.invalidate()

    # --- entries and tables ---

    def _map(self, slot: int, gfn: int, entry: int) -> None:
        """Make an entry map this frame, or the large page around it."""
        self.shadow.end_lending(slot)
        if entry & LARGE:
            self.reverse.remove(slot)
            self.reverse.add_large(slot, gfn)
        elif (before := self.reverse.frame_at(slot)) != gfn:
            if before is not None:
                self.reverse.remove(slot)
            self.reverse.add(slot, gfn)
        self.write_u64(slot, entry)

    def _zap(self, slot: int) -> None:
        """Make an entry that maps something map nothing."""
        self.shadow.end_lending(slot)
        self.write_u64(slot, 0)
        self.reverse.remove(slot)

    def discard(self) -> None:
        """Begin again with nothing."""
        self.finish_step()
        self.regions.clear()
        self.devices.clear()
        for tables in (self.pointers, self.directories, self.leaves):
            self.shadow.pool += tables.values()
            tables.clear()
        self.pieces.clear()
        self.reverse.clear()
        self.theirs.memory.fill(self.root, PAGE)
        self.guest.invalidate()

    def _directory(self, gva: int) -> int:
        """The table whose entries map 2 MBytes each."""
        key = gva >> DIRECTORY_SHIFT
        if (found := self.directories.pop(key, 0)) != 0:
            self.directories[key] = found
            return found
        table = self.directories[key] = self.shadow.new_table()
        if not self.role.is_long:
            self.write_u64(self.root + (key & 3) * 8, table | PRESENT)
            return table
        pointers = self.pointers.get(gva >> POINTER_SHIFT)
        if pointers is None:
            pointers = self.pointers[gva >> POINTER_SHIFT] = self.shadow.new_table()
            self.write_u64(self.root + (gva >> 36 & 0xFF8), pointers | TABLE)
        self.write_u64(pointers + (key & 511) * 8, table | TABLE)
        return table

    def _leaf(self, gva: int) -> int:
        """The table whose entries map 4 KBytes each."""
        directory, key = self._directory(gva), gva >> LARGE_SHIFT
        leaf = self.leaves.pop(key, 0)
        if not leaf:
            leaf, slot = self.shadow.new_table(), directory + (gva >> 18 & 0xFF8)
            if self.reverse.remove(slot):
                self.guest.invalidate()  # nobody could tell which addresses it was known for
            self.write_u64(slot, leaf | TABLE)
        self.leaves[key] = leaf
        return leaf

    def _drop_large(self, shift: int, number: int) -> None:
        """Drop everything inside a large page of the guest."""
        self.pieces.discard((shift, number))
        first, count = number << shift - LARGE_SHIFT, 1 << shift - LARGE_SHIFT
        for key in range(first, first + count):
            self.regions.pop(key, None)
            if key in self.leaves:
                self._free_leaf(key)
            if (directory := self.directories.get(key >> 9)) is not None:
                self._zap(directory + (key & 511) * 8)

    def evict(self, target: int) -> None:
        """First whole gigabytes, all but the last one; of that, 2 MBytes after 2 MBytes."""
        shadow = self.shadow
        self.regions.clear()
        for key in list(self.directories)[:-1]:
            if shadow.kept_bytes() <= target:
                break
            self._drop_directory(key)
            shadow.drain()
        for key in list(self.leaves):
            if shadow.kept_bytes() <= target:
                break
            self._drop_leaf(key)
            self.write_u64(self.directories[key >> 9] + (key & 511) * 8, 0)
            shadow.drain()
        self.pieces = {
            (shift, number) for shift, number in self.pieces
            if (number in self.leaves if shift == LARGE_SHIFT
                else number >> DIRECTORY_SHIFT - shift in self.directories)
        }  # fmt: skip
        self.guest.invalidate()

    def _free_leaf(self, key: int) -> None:
        self.put_back()  # while the table is there
        leaf = self.leaves.pop(key)
        for index, _ in self._entries(leaf):
            self.reverse.remove(leaf + 8 * index)
        self.shadow.pool.append(leaf)

    def _drop_leaf(self, key: int) -> None:
        self._free_leaf(key)
        self.shadow.evictions += 1

    def _drop_directory(self, key: int) -> None:
        """Drop a gigabyte, and the 512 around it if that was the last one there."""
        directory = self.directories.pop(key)
        for index, entry in self._entries(directory):
            if entry & LARGE:
                self.reverse.remove(directory + 8 * index)
            else:
                self._drop_leaf(key << 9 | index)
        self.shadow.pool.append(directory)
        self.shadow.evictions += 1
        above = self.pointers.get(key >> 9, self.root)
        self.write_u64(above + (key & (511 if self.role.is_long else 3)) * 8, 0)
        if self.role.is_long and not self._entries(above):
            self.shadow.pool.append(self.pointers.pop(key >> 9))
            self.write_u64(self.root + (key >> 9 & 511) * 8, 0)

    # --- snapshots ---

    def save_tables(self) -> dict[str, Any]:
        """These, as plain values without host frames."""
        leaves, directories = self.leaves.items(), self.directories.items()
        return {
            "directories": [
                [key, packed(hpa, self._pages(hpa), self.reverse)] for key, hpa in directories
            ],
            "leaves": [[key, packed(hpa, self._entries(hpa), self.reverse)] for key, hpa in leaves],
            "pieces": sorted(map(list, self.pieces)), "used": self.used,
        }  # fmt: skip

    def _entries(self, table: int) -> list[tuple[int, int]]:
        words = memoryview(self.theirs.memory.read(table, PAGE)).cast("Q")
        return [(index, entry) for index, entry in enumerate(words) if entry]

    def _pages(self, directory: int) -> list[tuple[int, int]]:
        return [(index, entry) for index, entry in self._entries(directory) if entry & LARGE]

    def load_tables(self, saved: dict[str, Any]) -> None:
        """Make them anew.  ValueError if they cannot be tables of ours."""
        if self.real is None:
            self.guest.load_root(self.root)
        self.discard()
        directories = restore(list[tuple[U62, str]], saved["directories"], "directories")
        leaves = restore(list[tuple[U62, str]], saved["leaves"], "leaves")
        pieces = restore(list[tuple[U62, U62]], saved["pieces"], "pieces")
        if any(shift not in LARGE_SHIFTS for shift, _ in pieces):
            raise ValueError("snapshot: pieces of a page of a size that there is not")
        self.pieces = set(pieces)
        for key, text in directories:
            self._check(key << DIRECTORY_SHIFT)
            directory = self._directory(key << DIRECTORY_SHIFT)
            for index, gfn, flags in unpacked(text, self.p2m):
                if not flags & LARGE:
                    raise ValueError("snapshot: a small page in a directory")
                if large := self.theirs.large_frame(gfn):
                    self._map(directory + 8 * index, gfn, large | flags)
        for key, text in leaves:
            gva = key << LARGE_SHIFT
            self._check(gva)
            if key in self.leaves:
                raise ValueError("snapshot: two tables for the same addresses")
            leaf = self._leaf(gva)
            for index, gfn, flags in unpacked(text, self.p2m):
                if flags & LARGE:
                    raise ValueError("snapshot: a large page in a table of small ones")
                self._map(leaf + 8 * index, gfn, self.look_up(gfn) | flags)
        for key, _ in directories:  # in the order in which faults have needed them
            self._directory(key << DIRECTORY_SHIFT)

        self.used = restore(int, saved["used"], "used")

    def _check(self, gva: int) -> None:
        if not (is_canonical(gva) if self.role.is_long else gva < 1 << 32):
            raise ValueError(f"snapshot: tables for {gva:#x}, which is no address")

    def name_table(self, hpa: int) -> list[int]:
        kinds = ({0: self.root}, self.pointers, self.directories, self.leaves)
        for kind, tables in enumerate(kinds):
            for key, table in tables.items():
                if table == hpa:
                    return [kind, key]
        raise KeyError(hpa)

    def named_table(self, name: list[int]) -> int:
        kind, key = name
        return ({0: self.root}, self.pointers, self.directories, self.leaves)[kind][key]

    def frames(self) -> list[int]:
        """The host frames (pfn) that they occupy."""
        tables = [self.root]
        for kind in (self.pointers, self.directories, self.leaves):
            tables += kind.values()
        return [table >> PAGE_SHIFT for table in tables]


class Vtlb(Shadow[VtlbView], name="vtlb"):
    """A set of tables for each processor, out of one budget."""

    def new_view(self, guest: Guest) -> VtlbView:
        return VtlbView(self, guest)

    def p2m_change(self, runs: Runs) -> None:
        self.finish_steps()
        self.forget(runs)
        for view in self.views:
            view.p2m_change(runs)

    def kept_bytes(self) -> int:
        tables, entries = len(self.pool), 0
        for view in self.views:  # at each fault
            tables += 1 + len(view.pointers) + len(view.directories) + len(view.leaves)
            entries += len(view.reverse)
        return TABLE_BYTES * tables + ENTRY_BYTES * entries

    def evict(self, target: int) -> None:
        """First what belongs to the processor that has filled nothing for the longest time."""
        self.finish_steps()
        for view in sorted(self.views, key=lambda view: view.used):
            if self.kept_bytes() > target:
                view.evict(target)

    def save_tables(self) -> dict[str, Any]:
        return {"views": [view.save_tables() for view in self.views]}

    def load_tables(self, saved: dict[str, Any]) -> None:
        for view, tables in zip(self.views, saved["views"], strict=True):
            view.load_tables(tables)

    def frames(self) -> list[int]:
        own = [pfn for view in self.views for pfn in view.frames()]
        own += [table >> PAGE_SHIFT for table in self.pool]
        return sorted(own + self.real_mode.frames())


def page_entry(hpa: int, found: Found, error: int, *, may_write: bool) -> int:
    """The entry that gives the guest what its own entries do; writes, once they are dirty."""
    entry = hpa | PAGE_ENTRY | found.rights & USER
    if found.no_execute:
        entry |= NO_EXECUTE
    if found.path:
        entry |= found.path[-1][1] & KEY
    is_dirty = error & E_WRITE or not found.path or found.path[-1][1] & DIRTY
    if is_dirty and may_write:
        entry |= found.rights & WRITABLE
    return entry
