"""Shadow paging: what all techniques without EPT share.

Idea: the processor translates by tables of the hypervisor's own, from gva straight to hpa, that
combine the guest's tables with the p2m.  Source: lecture, "A reminder on shadow page tables"; Adams
and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".

The tables are Intel 64 ones for a guest in IA-32e mode and PAE ones for every other (also for one
that does not page yet: its tables map each gpa to its hpa).  Their accessed and dirty flags are
always set; the guest's are set by the walk that a hidden fault makes: an entry appears only when
the guest's entry has been used, and allows writes only when the guest's is dirty.

Invariants: the guest's tables are read where they lie; a frame is named only while the p2m names
it; processors hear (INVVPID) of every entry that was present and allows less than it did.
"""

from abc import abstractmethod
from typing import Any, Final, NamedTuple

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.cr import RFLAGS
from understudy.guest import Control, Guest
from understudy.machine import words
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging import BUDGET, Answer, Fault
from understudy.paging.budget import Budgeted
from understudy.paging.guest_walk import (
    ACCESSED,
    DIRTY,
    E_FETCH,
    E_KEY,
    E_PRESENT,
    E_USER,
    E_WRITE,
    INTEL64,
    NO_EXECUTE,
    NO_KEYS,
    PRESENT,
    USER,
    WRITABLE,
    Found,
    GuestFault,
    Keys,
    Regime,
    key_refuses,
)
from understudy.paging.portable import Gfns

TABLE: Final = PRESENT | WRITABLE | USER | ACCESSED
"""An entry that names a table and leaves all rights to the entries below."""
PAGE_ENTRY: Final = PRESENT | ACCESSED | DIRTY
LARGE_FRAMES: Final = 512
LARGE_SHIFT: Final = 21
NOT_LARGE: Final = (
    words.PROTECTED | LARGE_FRAMES - 1 << PAGE_SHIFT
)  # in the word of its first frame
BELOW_4G: Final = 1 << 32
REGIMES_KEPT: Final = 64
REGIONS_KEPT: Final = 4096
DEVICES_KEPT: Final = 4096
ERROR: Final = E_WRITE | E_USER | E_FETCH  # what decides, of a fault's error code
ERROR_BITS: Final = 5
HIDDEN: Final = Answer(Fault.HIDDEN)
AC: Final = RFLAGS.AC.mask


class Region(NamedTuple):
    """Two megabytes of linear addresses: what the upper levels of a walk came to there."""

    table: int  # hpa of the guest's table of the last level
    rights: int  # WRITABLE | USER, combined over the levels above it
    no_execute: int  # NO_EXECUTE likewise
    leaf: int  # hpa of our table of the last level


class Shadow(Budgeted):
    """Tables of the hypervisor's own for one virtual processor."""

    guest: Guest

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.read_u64, self.write_u64 = host.memory.read_u64, host.memory.write_u64
        self.read_u32, self.write_u32 = host.memory.read_u32, host.memory.write_u32
        self.hpas: dict[int, int] = {}  # by gfn: what was looked up in the p2m lately
        self.regions: dict[int, Region] = {}  # by gva >> 21; a paging-structure cache
        self.devices: dict[int, int] = {}  # by gva >> 12 and error code: a TLB of pages without RAM
        self.patched: list[tuple[int, int]] = []  # (slot, entry) to be put back after a step
        self.regime = Regime(0, 0, 0, 0)
        self.regimes: dict[Control, Regime] = {}  # address spaces come back again and again
        self.is_long = False
        self.leaf_reserved = 0
        self.loaded = 0  # the root in use

    def attach(self, guest: Guest) -> None:
        super().attach(guest)
        self.guest = guest

    # --- events ---

    def page_fault(self, gva: int, error: int) -> Answer:
        keys = self.guest.protection_keys()
        device = self.devices.get(gva >> PAGE_SHIFT << ERROR_BITS | error & ERROR)
        if device is not None and keys == NO_KEYS:
            return Answer(Fault.DEVICE, device | gva & PAGE - 1)
        region = self.regions.get(gva >> LARGE_SHIFT)
        if region is not None and self._is_filled(gva, error, region, keys):
            self.fills += 1
            return HIDDEN
        smap = self.regime.smap and not error & E_USER and self._is_smap_armed()
        found = self.regime.walk(self.read_entry, gva, error, smap, keys)
        if error & E_KEY and found.path:
            self._heed_key(gva, error, found, keys)
        gfn = found.gpa >> PAGE_SHIFT
        hpa = self.hpas.get(gfn) or self.look_up(gfn)
        if not hpa:
            return self._note_device(gva, error, found)
        if error & E_WRITE and self.p2m.protected and self.p2m.is_protected(gfn):
            self.p2m.touch(gfn, write=True)
            hpa = self.look_up(gfn)
        self.mark(found, error)
        return self.fill(gva, error, found, hpa)

    def finish_step(self) -> None:
        if not self.patched:
            return
        for slot, entry in reversed(self.patched):
            self.write_u64(slot, entry)
        self.patched.clear()
        self.guest.single_step(False)
        self.invalidate()

    def patch(self, slots: list[tuple[int, int]]) -> None:
        """Add rights (slot, flags) until the next instruction is done."""
        for slot, flags in slots:
            entry = self.read_u64(slot)
            if flags & ~entry:
                self.patched.append((slot, entry))
                self.write_u64(slot, entry | flags)
        self.guest.single_step(True)

    def _heed_key(self, gva: int, error: int, found: Found, keys: Keys) -> None:
        """Under our tables CR0.WP is always set: so keys refuse writes to a supervisor, too."""
        if key_refuses(found.path[-1][1], found.rights, error, keys, wp=True):
            raise GuestFault(gva, error & (E_PRESENT | E_WRITE | E_USER | E_KEY))

    def _is_filled(self, gva: int, error: int, region: Region, keys: Keys) -> bool:
        """The common case: the guest's last entry allows the access.  False: look closely."""
        if self.regime.entry_bytes == 8:
            at = region.table + (gva >> 9 & 0xFF8)
            entry = self.read_u64(at)
        else:
            at = region.table + (gva >> 10 & 0xFFC)
            entry = self.read_u32(at)
        rights = entry & region.rights
        no_execute = (entry | region.no_execute) & NO_EXECUTE
        if (
            not entry & PRESENT
            or entry & self.leaf_reserved
            or (error & E_USER and not rights & USER)
            or (error & E_FETCH and no_execute)
            or (keys != NO_KEYS and key_refuses(entry, rights, error, keys, wp=True))
            or (rights & USER and not error & E_USER and self._is_kept_out(error))
        ):
            return False
        gfn = (entry & self.regime.address_mask) >> PAGE_SHIFT
        if error & E_WRITE and (
            not rights & WRITABLE or (self.p2m.protected and self.p2m.is_protected(gfn))
        ):
            return False
        hpa = self.hpas.get(gfn) or self.look_up(gfn)
        if not hpa or self.regions.get(gva >> LARGE_SHIFT) is not region:
            return False
        wanted = entry | (ACCESSED | DIRTY if error & E_WRITE else ACCESSED)
        slot = region.leaf + (gva >> 9 & 0xFF8)
        if not self.fill_slot(slot, gfn, hpa, wanted, rights, no_execute, error):
            return False
        if wanted != entry:
            if self.regime.entry_bytes == 8:
                self.write_u64(at, wanted)
            else:
                self.write_u32(at, wanted)
        return True

    def _note_device(self, gva: int, error: int, found: Found) -> Answer:
        """No RAM: remember what the walk came to, as a TLB would, for drivers come again."""
        self.mark(found, error)
        if not self.regime.smap:  # else RFLAGS.AC has a say
            key = gva >> PAGE_SHIFT << ERROR_BITS | error & ERROR
            if len(self.devices) >= DEVICES_KEPT:
                self.devices.clear()
            self.devices[key] = found.gpa & -PAGE
        return Answer(Fault.DEVICE, found.gpa)

    def _is_kept_out(self, error: int) -> bool:
        """Whether SMEP or SMAP may keep a supervisor's access from a user page."""
        return self.regime.smep if error & E_FETCH else self.regime.smap

    @abstractmethod
    def fill_slot(
        self, slot: int, gfn: int, hpa: int, entry: int, rights: int, no_execute: int, error: int
    ) -> bool:
        """Make one entry of the last level; False if there is more to it.

        `entry`: the guest's, with the flags that the access sets.
        """

    def note_region(self, gva: int, found: Found, leaf: int) -> None:
        """Remember what a walk to a small page has found on the levels above the last."""
        gfn = found.path[-1][0] >> PAGE_SHIFT
        if self.p2m.protected and self.p2m.is_protected(gfn):
            return
        rights, no_execute = WRITABLE | USER, 0
        for _, entry in found.path[:-1]:
            rights &= entry
            no_execute |= entry & NO_EXECUTE
        table = self.hpas.get(gfn) or self.look_up(gfn)
        if len(self.regions) >= REGIONS_KEPT:
            self.regions.clear()
        self.regions[gva >> LARGE_SHIFT] = Region(table, rights, no_execute, leaf)

    @abstractmethod
    def fill(self, gva: int, error: int, found: Found, hpa: int) -> Answer:
        """Let the access of a hidden fault go on; or say that it is a trace fault."""

    def forget_hpas(self, runs: Runs) -> None:
        """The p2m has changed here."""
        self.regions.clear()
        self.devices.clear()
        if sum(count for _, count in runs) > len(self.hpas):
            self.hpas.clear()
            return
        for gfn, count in runs:
            for frame in range(gfn, gfn + count):
                self.hpas.pop(frame, None)

    # --- the guest's tables ---

    def fetch(self, gva: int, length: int) -> bytes:
        error = E_FETCH | (E_USER if self.guest.cpl() == 3 else 0)
        code = b""
        while len(code) < length:
            try:
                gpa = self.regime.walk(self.read_entry, gva + len(code), error).gpa
            except GuestFault:
                break
            if not (hpa := self.look_up(gpa >> PAGE_SHIFT)):
                break
            part = min(length - len(code), PAGE - (gpa & PAGE - 1))
            code += self.memory.read(hpa + (gpa & PAGE - 1), part)
        return code

    def look_up(self, gfn: int) -> int:
        """The hpa of a guest frame, 0 if it has none."""
        pfn = self.p2m.lookup(gfn)
        if pfn is None:
            if not self.p2m.touch(gfn):
                return 0
            pfn = self.p2m.lookup(gfn)
            assert pfn is not None
        self.hpas[gfn] = hpa = pfn << PAGE_SHIFT
        return hpa

    def read_entry(self, at: int, size: int) -> int:
        """An entry of a guest's table; 0 where there is no RAM."""
        gfn = at >> PAGE_SHIFT
        hpa = self.hpas.get(gfn) or self.look_up(gfn)
        if not hpa:
            return 0
        hpa += at & PAGE - 1
        return self.read_u64(hpa) if size == 8 else self.read_u32(hpa)

    def mark(self, found: Found, error: int) -> None:
        """Set the accessed and dirty flags that the access sets."""
        path = found.path
        for n, (at, entry) in enumerate(path, 1 - len(path)):
            wanted = ACCESSED | DIRTY if error & E_WRITE and n == 0 else ACCESSED
            if wanted & ~entry:
                self.set_entry(at, entry | wanted)

    def _hpa_to_write(self, gpa: int) -> int:
        """Where a gpa is, once what protects its frame from writes was asked."""
        gfn = gpa >> PAGE_SHIFT
        if self.p2m.protected and self.p2m.is_protected(gfn):
            self.p2m.touch(gfn, write=True)
        return (self.hpas.get(gfn) or self.look_up(gfn)) + (gpa & PAGE - 1)

    def store(self, gpa: int, size: int, value: int) -> None:
        """Carry out the guest's write to a table, inside one page."""
        hpa = self._hpa_to_write(gpa)
        if size == 8:
            self.write_u64(hpa, value)
        elif size == 4:
            self.write_u32(hpa, value)
        else:
            self.memory.write(hpa, value.to_bytes(size, "little"))
        self.p2m.written(gpa, size)

    def set_entry(self, at: int, entry: int) -> None:
        """Write an entry of a guest's table in the processor's stead."""
        hpa = self._hpa_to_write(at)
        if self.regime.entry_bytes == 8:
            self.write_u64(hpa, entry)
        else:
            self.write_u32(hpa, entry)

    def _is_smap_armed(self) -> bool:
        """For a supervisor access; implicit ones, at CPL 3, are never exempt."""
        return self.guest.cpl() == 3 or not self.guest.rflags & AC

    # --- the hypervisor's tables ---

    def large_frame(self, gfn: int) -> int:
        """The hpa of the 2-MByte page that holds `gfn`, if there is one behind it; or 0."""
        word = self.p2m.uniform(gfn & -LARGE_FRAMES, 2)
        if word is None or not word & words.PRESENT or word & NOT_LARGE:
            return 0
        return word & words.ADDRESS

    def use_root(self, root: int) -> None:
        """Translate by this table from the next entry on."""
        self.loaded = root
        self.guest.load_root(root)

    def invalidate_pages(self, addresses: list[int]) -> None:
        """Make them forget the pages of the root in use that are at these canonical addresses."""
        for guest in self.guests:
            guest.invalidate(addresses)

    # --- snapshots ---

    @abstractmethod
    def save_tables(self, gfns: Gfns) -> dict[str, Any]:
        """The tables, as plain values without host frames."""

    @abstractmethod
    def load_tables(self, saved: dict[str, Any]) -> None:
        """Make the tables anew."""

    @abstractmethod
    def name_table(self, hpa: int) -> list[int]:
        """What a table stands for."""

    @abstractmethod
    def named_table(self, name: list[int]) -> int:
        """The hpa of the table that stands for this."""

    def save(self) -> dict[str, Any]:
        steps = [  # what a step has added, and where
            [self.name_table(slot & -PAGE), (slot & PAGE - 1) >> 3, self.read_u64(slot) & ~entry]
            for slot, entry in self.patched
        ]
        now = [(slot, self.read_u64(slot)) for slot, _ in self.patched]
        for slot, entry in reversed(self.patched):
            self.write_u64(slot, entry)
        tables = self.save_tables(Gfns(self.p2m))
        for slot, entry in now:
            self.write_u64(slot, entry)
        return super().save() | {"tables": tables, "steps": steps, "pool": len(self.pool)}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self.hpas.clear()
        self.read_regime()
        try:
            self.load_tables(saved["tables"])
            while len(self.pool) < saved["pool"]:
                self.pool.append(self.reserve.frame())
        except OutOfFrames as problem:
            raise ValueError(f"snapshot: tables beyond the budget: {problem}") from None
        if self.kept_bytes() > self.budget:
            raise ValueError("snapshot: more is noted of the tables than the budget allows")
        steps = [
            (self.named_table(name) + 8 * index, flags) for name, index, flags in saved["steps"]
        ]
        if any(flags & ~WRITABLE or slot % PAGE % 8 for slot, flags in steps):
            raise ValueError("snapshot: a step adds more than the right to write")
        if steps:
            self.patch(steps)

    def read_regime(self) -> None:
        """See how the guest translates now."""
        values = self.guest.paging_control()
        known = self.regimes.get(values)
        if known is None:
            if len(self.regimes) >= REGIMES_KEPT:
                self.regimes.clear()
            known = self.regimes[values] = Regime(*values)
        self.regime = known
        self.is_long = self.regime.format is INTEL64
        self.devices.clear()
        self.regions.clear()
        form = self.regime.format
        if form is not None:
            self.leaf_reserved = form.levels[-1].reserved_page | self.regime.reserved_nx
