"""What one processor has of shadow paging: its registers' meaning, its root, its caches.

A page fault of the processor is sorted here, by the guest's own tables as its registers name them.
What it keeps for itself are a paging-structure cache and a TLB of pages without RAM: each processor
may keep what the guest has not told it to forget, so a cache that two shared would be stale.

While the guest does not page, in real-address mode and on the way out of it, an EPT translates
(`real_mode`).

Source: SDM 3A, "Caching Translation Information"; Adams and Agesen, "A Comparison of Software and
Hardware Techniques for x86 Virtualization".
Invariant: rights that were lent for one instruction are taken back before another processor
executes anything.
"""

from abc import abstractmethod
from typing import Any, Final, NamedTuple

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.cr import CR0, RFLAGS
from understudy.guest import Guest
from understudy.paging import Answer, Fault, PagingError, View
from understudy.paging.budget import Budgeted
from understudy.paging.guest_tables import GuestTables
from understudy.paging.guest_walk import (
    ACCESSED,
    DIRTY,
    E_FETCH,
    E_KEY,
    E_PRESENT,
    E_USER,
    E_WRITE,
    KEY,
    KEY_SHIFT,
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
from understudy.paging.real_mode import RealMode
from understudy.paging.roles import ROLES
from understudy.state import U9, U64, restore

LARGE_SHIFT: Final = 21
REGIONS_KEPT: Final = 4096
DEVICES_KEPT: Final = 4096
NOW_AND_THEN: Final = 0xFF  # so many more entries may be kept before anybody looks
ERROR: Final = E_WRITE | E_USER | E_FETCH  # what decides, of a fault's error code
ERROR_BITS: Final = 5
OPENED: Final = USER | KEY  # what opens a page to a supervisor's write
LENT: Final = OPENED | WRITABLE
HIDDEN: Final = Answer(Fault.HIDDEN)
AC: Final = RFLAGS.AC.mask
PE: Final = CR0.PE.mask
PG: Final = CR0.PG.mask


class Region(NamedTuple):
    """Two megabytes of linear addresses: what the upper levels of a walk came to there."""

    table: int  # hpa of the guest's table of the last level
    rights: int  # WRITABLE | USER, combined over the levels above it
    no_execute: int  # NO_EXECUTE likewise
    leaf: int  # hpa of our table of the last level


class ShadowView(View):
    """One processor's."""

    takes_turns = True
    paging: Budgeted

    def __init__(
        self, paging: Budgeted, guest: Guest, theirs: GuestTables, real_mode: RealMode,
        lent: "dict[int, ShadowView]",
    ) -> None:  # fmt: skip
        super().__init__(paging, guest)
        self.theirs, self.real_mode, self.p2m = theirs, real_mode, theirs.p2m
        self.read_u64, self.write_u64 = theirs.read_u64, theirs.write_u64
        self.read_u32, self.write_u32 = theirs.read_u32, theirs.write_u32
        self.hpas, self.here, self.look_up = theirs.hpas, theirs.here, theirs.look_up
        self.read_entry = theirs.read_entry
        self.regions: dict[int, Region] = {}  # by gva >> 21; a paging-structure cache
        self.devices: dict[int, int] = {}  # by gva >> 12 and error code: a TLB of pages without RAM
        self.patched: list[tuple[int, int]] = []  # (slot, entry) to be put back after a step
        self.lent = lent  # the slots of all processors' steps, and whose they are
        self.is_watched = False  # it comes back after one instruction
        self.regime, self.role = Regime(0, 0, 0, 0), ROLES[0]
        self.real: View | None = None  # by which it translates instead

    # --- real-address mode ---

    def adapt(self, cr0: int) -> bool:
        is_real = not cr0 & PE or (self.real is not None and not cr0 & PG)
        if is_real == (self.real is not None):
            return False
        if is_real:
            self.real = self.real_mode.enter(self.guest)
            self.finish_step()
            self.eptp, self.watched_cr0 = self.real.eptp, PG
        else:
            self.real_mode.leave(self.guest)
            self.real, self.eptp, self.watched_cr0 = None, 0, 0
        self.note_real()
        return True

    @abstractmethod
    def note_real(self) -> None:
        """It does not translate by shadow tables any more, or will when it has loaded a root."""

    def violation(self, gpa: int, qualification: int) -> bool:
        assert self.real is not None
        if not self.real.violation(gpa, qualification):
            return False
        self.paging.fills += 1
        if not self.paging.fills & NOW_AND_THEN:
            self.paging.make_room()
        return True

    def misconfiguration(self, gpa: int) -> PagingError:
        assert self.real is not None
        return self.real.misconfiguration(gpa)

    # --- events ---

    def page_fault(self, gva: int, error: int) -> Answer:
        keys = self.guest.protection_keys()
        device = self.devices.get(gva >> PAGE_SHIFT << ERROR_BITS | error & ERROR)
        if device is not None and keys == NO_KEYS:
            return Answer(Fault.DEVICE, device | gva & PAGE - 1)
        region = self.regions.get(gva >> LARGE_SHIFT)
        if region is not None and self._is_filled(gva, error, region, keys):
            self.paging.fills += 1
            return HIDDEN
        smap = self.regime.smap and not error & E_USER and self._is_smap_armed()
        found = self.regime.walk(self.read_entry, gva, error, smap, keys)
        if self.regime.smap and error & (E_PRESENT | E_USER) == E_PRESENT and found.rights & USER:
            self._refuse_implicit(gva, error, keys)
        self.theirs.mark(found, error, self.regime.entry_bytes)  # frames may move, this one, too
        gfn = found.gpa >> PAGE_SHIFT
        if not (hpa := self.hpas.get(gfn) or self.here(gfn)):
            if self.p2m.is_coming(gfn):
                return HIDDEN
            hpa = self.look_up(gfn)
        if not hpa:
            return self._note_device(gva, error, found)
        if error & E_WRITE and self.p2m.protected and self.p2m.is_protected(gfn):
            self.p2m.touch(gfn, write=True)
            hpa = self.look_up(gfn)
        return self.fill(gva, error, found, hpa)

    def finish_step(self) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Take back the rights that were lent for one instruction, whether it is done or not."""
        if self.patched:
            for slot, entry in reversed(self.patched):
                self.write_u64(slot, entry)
                self.lent.pop(slot, None)
            self.patched.clear()
            self.guest.invalidate()
        if self.is_watched and not self.guest.is_inside:
            self.is_watched = False
            self.guest.single_step(False)

    def lend(self, slots: list[int], gva: int, error: int, found: Found) -> None:
        """Let one instruction write to the page of the last of these slots, from the root down.

        While CR0.WP=0 a supervisor may, whatever rights and key say (SDM 3A, "Protection Keys");
        under our tables it is always set.  Raises GuestFault if every key refuses.
        """
        keys, opened = self.guest.protection_keys(), 0
        last = self.read_u64(slots[-1])
        if keys == NO_KEYS or not key_refuses(last, found.rights, error, keys, wp=True):
            opened = last & OPENED
        elif (opened := open_page(found.rights, keys)) < 0:
            raise GuestFault(gva, error & (E_PRESENT | E_WRITE | E_USER | E_KEY))
        lent = [(slot, self.read_u64(slot) & OPENED | WRITABLE) for slot in slots[:-1]]
        self._lend([*lent, (slots[-1], opened | WRITABLE)])

    def _lend(self, slots: list[tuple[int, int]]) -> None:
        """Change what the entries in these slots lend until the next instruction is done."""
        for slot, flags in slots:
            entry = self.read_u64(slot)
            lent = entry & ~LENT | flags
            if lent != entry:
                self.patched.append((slot, entry))
                self.lent[slot] = self
                self.write_u64(slot, lent)
        self.is_watched = True
        self.guest.single_step(True)

    def _is_filled(self, gva: int, error: int, region: Region, keys: Keys) -> bool:
        """The common case: the guest's last entry allows the access.  False: look closely."""
        if not self.paging.fills & NOW_AND_THEN and self.paging.is_over:
            return False
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
            or entry & self.role.leaf_reserved
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
        if not (hpa := self.hpas.get(gfn) or self.here(gfn)):
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
        if not (table := self.theirs.here(gfn)):  # nobody is asked: `leaf` might have to go
            return
        if len(self.regions) >= REGIONS_KEPT:
            self.regions.clear()
        self.regions[gva >> LARGE_SHIFT] = Region(table, rights, no_execute, leaf)

    @abstractmethod
    def fill(self, gva: int, error: int, found: Found, hpa: int) -> Answer:
        """Let the access of a hidden fault go on; or say that it is a trace fault."""

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
            code += self.theirs.memory.read(hpa + (gpa & PAGE - 1), part)
        return code

    def _is_smap_armed(self) -> bool:
        """For a supervisor access; implicit ones, at CPL 3, are never exempt."""
        return self.guest.cpl() == 3 or not self.guest.rflags & AC

    def _refuse_implicit(self, gva: int, error: int, keys: Keys) -> None:
        """RFLAGS.AC exempts a program's page for operands, not for the processor's own accesses.

        A fault does not say which it was (SDM 3A, "Access Rights"): the processor's own if our
        tables let operands through.  Raises GuestFault if so.
        """
        if error & E_FETCH:
            return
        ours = Regime(*self.guest.real_control()[:4])
        try:
            ours.walk(lambda at, size: self.read_u64(at), gva, error, False, keys)
        except GuestFault:
            return
        raise GuestFault(gva, error & (E_PRESENT | E_WRITE))

    def read_regime(self) -> None:
        """See how the guest translates now."""
        self.regime, self.role = self.theirs.regime(self.guest.paging_control())
        self.forget()

    def forget(self) -> None:
        """What was kept of the guest's tables, beside ours, is not to be used any more."""
        self.devices.clear()
        self.regions.clear()

    # --- snapshots ---

    @abstractmethod
    def name_table(self, hpa: int) -> list[int]:
        """What a table stands for."""

    @abstractmethod
    def named_table(self, name: list[int]) -> int:
        """The hpa of the table that stands for this."""

    def save_step(self) -> dict[str, Any]:
        """What a step has lent, and where."""
        lent = [
            [self.name_table(slot & -PAGE), (slot & PAGE - 1) >> 3, self.read_u64(slot) & LENT]
            for slot, _ in self.patched
        ]
        return {"lent": lent, "is_watched": self.is_watched}

    def load_step(self, saved: dict[str, Any]) -> None:
        """Lend it again.  ValueError if it is more than a step may lend."""
        lent = restore(list[tuple[list[int], U9, U64]], saved["lent"], "lent")
        steps = [(self.named_table(name) + 8 * index, flags) for name, index, flags in lent]
        lendable = LENT if self.role.is_long else WRITABLE | USER
        for slot, flags in steps:
            if flags & ~lendable or flags & ~self.read_u64(slot) & USER:
                raise ValueError("snapshot: a step lends more than a write")
        if saved["is_watched"]:
            self._lend(steps)


def open_page(rights: int, keys: Keys) -> int:
    """USER and the key with which a supervisor may write to a page; -1 if every key refuses.

    A user page whose own keys all refuse may become a supervisor's for the while.
    """
    for user in (rights & USER, 0):
        for key in range(16):
            if not keys[0 if user else 1] >> 2 * key & 3:
                return user | key << KEY_SHIFT
    return -1
