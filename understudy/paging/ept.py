"""Extended page tables: the processor walks the guest's tables and ours, in two dimensions.

Idea: the guest edits its tables and loads CR3 without exits; a second table, from gpa to hpa,
confines it.  Source: lecture, "Nested paging"; SDM 3C, "The Extended Page Table Mechanism (EPT)".
Cost: a TLB miss takes up to 24 references instead of 4.

The tables follow the p2m at once (they are small, and RAM that they name costs nothing until it
is touched).  Wherever gfn and pfn are both aligned to a larger page, a larger page is used; a
change inside one splits it, and a change that makes a run whole again merges it.

Invariants: an entry grants access exactly to the frames that the p2m names; accessed and dirty
flags survive splitting and merging; processors hear (INVEPT) of every entry that was present and
is not what it was.
"""

from typing import Final

from understudy.arch.bits import Bit, Bits, Field
from understudy.arch.vmcs import EptPointer, EptViolation
from understudy.machine.frames import PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging import Paging, PagingError
from understudy.quantities import bytes_of

WRITE_BACK: Final = 6
LEVELS: Final = 4


class EptEntry(Bits, width=64):
    """An EPT paging-structure entry.  SDM 3C, "EPT Translation Mechanism"."""

    ADDR = Field(51, 12)  # physical address of the page or of the next table, >> 12
    D = Bit(9)  # dirty, in an entry that maps a page
    A = Bit(8)  # accessed
    PS = Bit(7)  # maps a 2-MByte or 1-GByte page
    IPAT = Bit(6)  # ignore PAT memory type
    MEMTYPE = Field(5, 3)
    X = Bit(2)
    W = Bit(1)
    R = Bit(0)


RWX: Final = int(EptEntry(X=1, W=1, R=1))
RX: Final = int(EptEntry(X=1, R=1))
WRITE: Final = EptViolation.WRITE.mask
READABLE: Final = EptViolation.READABLE.mask
READ_ONLY: Final = READABLE | EptViolation.WRITABLE.mask
AD: Final = int(EptEntry(A=1, D=1))
ADDR_MASK: Final = EptEntry.ADDR.mask
LARGE: Final = int(EptEntry(PS=1))


def is_table(entry: int, level: int) -> bool:
    """Whether the entry names a table of the next level."""
    return bool(entry & RWX) and level > 1 and not entry & LARGE


class Ept(Paging, name="ept"):
    """One EPT per VM."""

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", accessed_dirty: bool = True
    ) -> None:
        super().__init__(host, p2m, largest=largest)
        sizes = {1 << 12: 1, 1 << 21: 2, 1 << 30: 3}
        if bytes_of(largest) not in sizes:
            raise ValueError(f"EPT page size {largest!r}: expected 4K, 2M or 1G")
        self.largest_level = sizes[bytes_of(largest)]
        self.accessed_dirty = accessed_dirty
        self.memory = host.memory
        self.tables: set[int] = set()  # hpa of each table
        self.root = self._new_table()
        self._is_stale = False
        for extent in p2m:
            self.p2m_change(extent.gfn, extent.frames)

    @property
    def eptp(self) -> int:
        flags = EptPointer(
            ACCESSED_DIRTY=int(self.accessed_dirty), WALK=LEVELS - 1, MEMTYPE=WRITE_BACK
        )
        return self.root | flags

    def frames(self) -> list[int]:
        return sorted(table >> PAGE_SHIFT for table in self.tables)

    def p2m_change(self, gfn: int, count: int) -> None:
        self._is_stale = False
        self._sync(self.root, LEVELS, 0, gfn, gfn + count, 0)
        if self._is_stale:
            self.invalidate()

    def violation(self, gpa: int, qualification: int) -> bool:
        gfn = gpa >> PAGE_SHIFT
        is_write = bool(qualification & WRITE)
        was_there = self.p2m.lookup(gfn) is not None
        if not self.p2m.touch(gfn, write=is_write):
            return False
        is_refused = is_write and qualification & READ_ONLY == READABLE
        if was_there and self._reaches(gfn) and not is_refused:
            raise PagingError(
                f"EPT violation at gpa {gpa:#x}, qualification {qualification:#x}: the "
                "entry allows the access, so the processor uses a stale translation"
            )
        self.fills += 1
        self.p2m_change(gfn, 1)
        return True

    def entries(self, gpa: int) -> list[int]:
        """The entries on the way to `gpa`, from the root down."""
        table, out = self.root, []
        for level in range(LEVELS, 0, -1):
            entry = self.memory.read_u64(table + self._slot(gpa >> PAGE_SHIFT, level))
            out.append(entry)
            if not is_table(entry, level):
                break
            table = entry & ADDR_MASK
        return out

    # --- tables ---

    @staticmethod
    def _slot(gfn: int, level: int) -> int:
        return (gfn >> 9 * (level - 1) & 0x1FF) * 8

    def _reaches(self, gfn: int) -> bool:
        return bool(self.entries(gfn << PAGE_SHIFT)[-1] & RWX)

    def _new_table(self) -> int:
        table = self.host.frame()
        self.tables.add(table)
        return table

    def _sync(self, table: int, level: int, base: int, low: int, high: int, flags: int) -> None:
        """Make the entries of `table` that cover [low, high) agree with the p2m.

        `base` is the table's first gfn; `flags` are the accessed and dirty flags that entries
        which are new get (those of a large page that was split).
        """
        span = 1 << 9 * (level - 1)
        for index in range((low - base) // span, min((high - 1 - base) // span + 1, 512)):
            start = base + index * span
            slot = table + index * 8
            old = self.memory.read_u64(slot)
            new = self._leaf(start, level, span)
            if new is None and not self.p2m.within(start, span):
                new = 0
            if new is None:
                self._descend(slot, old, level, start, max(low, start), min(high, start + span))
                continue
            if is_table(old, level):
                found = self._drop(old, level)
                new |= found if new else 0
                self._is_stale = True
            elif old & ~AD == new:
                continue
            elif old & RWX:
                self._is_stale = True
            if new:
                new |= flags
            self.memory.write_u64(slot, new)

    def _leaf(self, gfn: int, level: int, span: int) -> int | None:
        """The entry that maps [gfn, gfn+span) as one page, if the p2m lets it."""
        if level > self.largest_level:
            return None
        extent = self.p2m.find(gfn)
        if extent is None or extent.gfn + extent.frames < gfn + span:
            return None
        pfn = extent.pfn + gfn - extent.gfn
        if pfn % span:
            return None
        rights = RWX
        if self.p2m.protected and self.p2m.has_protected(gfn, span):
            if level > 1:
                return None
            rights = RX
        return pfn << PAGE_SHIFT | (LARGE if level > 1 else 0) | WRITE_BACK << 3 | rights

    def _descend(self, slot: int, old: int, level: int, start: int, low: int, high: int) -> None:
        """The entry must name a table: make it, splitting a large page, and go on below."""
        flags = 0
        if is_table(old, level):
            below = old & ADDR_MASK
        else:
            below = self._new_table()
            low, high = start, start + (1 << 9 * (level - 1))
            if old & RWX:  # a large page is split: its parts keep its flags
                flags, self._is_stale = old & AD, True
        self._sync(below, level - 1, start, low, high, flags)
        if not is_table(old, level):
            self.memory.write_u64(slot, below | RWX)

    def _drop(self, entry: int, level: int) -> int:
        """Free the tables below; returns the accessed and dirty flags found in them."""
        table, flags = entry & ADDR_MASK, 0
        for index in range(512):
            child = self.memory.read_u64(table + index * 8)
            if is_table(child, level - 1):
                flags |= self._drop(child, level - 1)
            elif child & RWX:
                flags |= child & AD
        self.tables.discard(table)
        self.host.release(table >> PAGE_SHIFT)
        return flags
