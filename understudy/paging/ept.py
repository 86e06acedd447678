"""Extended page tables: the processor walks the guest's tables and ours, in two dimensions.

Idea: the guest edits its tables and loads CR3 without exits; a second table, from gpa to hpa,
confines it.  Source: lecture, "Nested paging"; SDM 3C, "The Extended Page Table Mechanism (EPT)".
Cost: a TLB miss takes up to 24 references instead of 4.

The tables follow the p2m at once (they are small, and RAM that they name costs nothing until it
is touched).  Wherever gfn and pfn are both aligned to a larger page and all its frames are in one
state, a larger page is used, also a read-only one; a change inside one splits it, and a change that
makes a run whole again merges it.

Invariants: an entry grants access exactly to the frames that the p2m names; accessed and dirty
flags survive splitting, merging and protecting; processors hear (INVEPT) of every entry that was
present and allows less than it did, or is elsewhere.  (One that allows more needs no INVEPT: an EPT
violation makes the processor look again.)
"""

from array import array
from typing import Final

from understudy.arch.address import FRAME, PAGE, PAGE_SHIFT
from understudy.arch.vmcs import EptPointer, EptViolation
from understudy.machine.host import Host
from understudy.machine.memory import SPARE
from understudy.machine.p2m import P2m, Runs
from understudy.machine.words import FRAMES, PRESENT, PROTECTED, RAM, number_of
from understudy.paging import BUDGET, Paging, PagingError
from understudy.paging.ept_entry import (
    AD,
    PLACE,
    RWX,
    WRITE_BACK,
    allows_less,
    described,
    is_table,
    leaf,
    leaves,
    misconfigurations,
    update,
    with_accessed,
)
from understudy.quantities import bytes_of

LEVELS: Final = 4
WRITE: Final = EptViolation.WRITE.mask
READABLE: Final = EptViolation.READABLE.mask
READ_ONLY: Final = READABLE | EptViolation.WRITABLE.mask
RIGHTS: Final = READ_ONLY | EptViolation.EXECUTABLE.mask
BULK: Final = 8  # entries of one table: with as many it costs less to make all 512 at once


class Ept(Paging, name="ept"):
    """One EPT per VM."""

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET,
        accessed_dirty: bool = True,
    ) -> None:  # fmt: skip
        """`budget` does not matter: the RAM bounds the tables."""
        super().__init__(host, p2m, largest=largest, budget=budget)
        sizes = {1 << 12: 1, 1 << 21: 2, 1 << 30: 3}
        if bytes_of(largest) not in sizes:
            raise ValueError(f"EPT page size {largest!r}: expected 4K, 2M or 1G")
        self.largest_level = sizes[bytes_of(largest)]
        self.accessed_dirty = accessed_dirty
        self.memory = host.memory
        self.tables: set[int] = set()  # hpa of each table
        self._leaves: dict[int, int] = {}  # block (gfn >> 9) -> its table, of those met lately
        self._is_stale = False
        try:
            self.root = self._new_table()
            for number in p2m.gigabytes():
                self._sync(self.root, LEVELS, number << 18, number + 1 << 18)
        except BaseException:  # there is no room for them: leave none
            self.close()
            raise

    @property
    def eptp(self) -> int:
        flags = EptPointer(
            ACCESSED_DIRTY=int(self.accessed_dirty), WALK=LEVELS - 1, MEMTYPE=WRITE_BACK
        )
        return self.root | flags

    def most_tables(self) -> int:
        blocks = {
            block for gfn, _, frames in self.p2m.pieces()
            for block in range(gfn >> 9, (gfn + frames - 1 >> 9) + 1)
        }  # fmt: skip
        gigabytes = {block >> 9 for block in blocks}
        upper = {gigabyte >> 9 for gigabyte in gigabytes}
        return 1 + len(upper) + len(gigabytes) + len(blocks) + SPARE * (LEVELS - 1)

    def frames(self) -> list[int]:
        return sorted(table >> PAGE_SHIFT for table in self.tables)

    def p2m_change(self, runs: Runs) -> None:
        self._is_stale = False
        for gfn, count in runs:
            table = self._leaves.get(gfn >> 9) if count == 1 else None
            if table is None or self.p2m.uniform(gfn & -FRAMES, 2) is not None:
                self._sync(self.root, LEVELS, gfn, gfn + count)
            else:  # the block is in pieces as before: its table has one entry to be changed
                self._sync(table, 1, gfn, gfn + 1)
        if self._is_stale:
            self.invalidate()

    def violation(self, gpa: int, qualification: int) -> bool:
        gfn, is_write = gpa >> PAGE_SHIFT, bool(qualification & WRITE)
        word = self.p2m.word(gfn)
        if not word & RAM:
            if qualification & RIGHTS and self.entries(gpa)[-1] & RWX:
                raise PagingError(self._disagreement(gpa, "EPT violation"))
            return False
        if word & PRESENT and not (is_write and word & PROTECTED):
            if not self._agrees(gpa):
                raise PagingError(self._disagreement(gpa, "EPT violation"))
            if not (is_write and qualification & READ_ONLY == READABLE):
                raise PagingError(
                    f"EPT violation at gpa {gpa:#x}, qualification {qualification:#x}: the entry "
                    "allows the access, so the processor uses a stale translation"
                )
        elif self.p2m.is_coming(gfn):
            return True
        elif not self.p2m.touch(gfn, write=is_write):
            raise PagingError(
                f"EPT violation at gpa {gpa:#x}, qualification {qualification:#x}: the frame's "
                f"owner does not allow the access (state {self.p2m.word(gfn):#x})"
            )
        self.fills += 1
        return True

    def misconfiguration(self, gpa: int) -> PagingError:
        return PagingError(self._disagreement(gpa, "EPT misconfiguration"))

    def entries(self, gpa: int) -> list[int]:
        """The entries on the way to `gpa`, from the root down."""
        table, out = self.root, []
        for level in range(LEVELS, 0, -1):
            entry = self.memory.read_u64(table + self._slot(gpa >> PAGE_SHIFT, level))
            out.append(entry)
            if not is_table(entry, level):
                break
            table = entry & FRAME
        return out

    # --- what the tables should say ---

    def _expected(self, gpa: int) -> list[int]:
        """The entries that should be on the way to `gpa`: 0 for one that names a table."""
        out: list[int] = []
        for level in range(LEVELS, 0, -1):
            first = gpa >> PAGE_SHIFT & -(1 << 9 * (level - 1))
            entry = self._entry(first, level)
            out.append(entry or 0)
            if entry is not None:
                break
        return out

    def _agrees(self, gpa: int) -> bool:
        found, expected = self.entries(gpa), self._expected(gpa)
        return len(found) == len(expected) and found[-1] & ~AD == expected[-1]

    def _disagreement(self, gpa: int, what: str) -> str:
        """The entries at `gpa` and what they should be, in words."""
        found, expected = self.entries(gpa), self._expected(gpa)
        lines = [f"{what} at gpa {gpa:#x}: the EPT is not what the p2m asks for"]
        for depth, entry in enumerate(found):
            level = LEVELS - depth
            line = f"level {level}: {described(entry, level)}"
            for wrong in misconfigurations(entry, level):
                line += f'; {wrong} (SDM 3C, "EPT Misconfigurations")'
            if depth == len(expected) - 1 and entry & ~AD != expected[-1]:
                line += f"; expected {described(expected[-1], level)}"
            elif depth < len(expected) - 1 and not is_table(entry, level):
                line += "; expected a table"
            elif depth >= len(expected):
                line += "; expected a larger page above it"
            lines.append(line)
        return "; ".join(lines[:1]) + "\n  " + "\n  ".join(lines[1:])

    def _entry(self, gfn: int, level: int) -> int | None:
        """What should stand for the page of this level that begins at `gfn`; None: a table."""
        word = self.p2m.uniform(gfn, level)
        if word is None or (level > self.largest_level and word & PRESENT):
            return None
        return leaf(word, level)

    # --- tables ---

    @staticmethod
    def _slot(gfn: int, level: int) -> int:
        return (gfn >> 9 * (level - 1) & 0x1FF) * 8

    def _new_table(self) -> int:
        table = self.reserve.frame()
        self.tables.add(table)
        return table

    def _sync(self, table: int, level: int, low: int, high: int) -> None:
        """Make the entries of `table` that cover [low, high) agree with the p2m."""
        if level == 1:
            self._leaves[low >> 9] = table
            if high - low >= BULK:
                self._sync_all(table, low)
                return
        shift = 9 * (level - 1)
        for number in range(low >> shift, (high - 1 >> shift) + 1):
            gfn, slot = number << shift, table + (number & 0x1FF) * 8
            old, new = self.memory.read_u64(slot), self._entry(gfn, level)
            if new is None:
                if is_table(old, level):
                    end = gfn + (1 << shift)
                    below = old & FRAME
                    self._sync(
                        below, level - 1, low if low > gfn else gfn, high if high < end else end
                    )
                    continue
                # A large page is split: its parts keep its flags.
                new = self._build(gfn, level - 1, old & AD if old & RWX else 0) | RWX
            elif is_table(old, level):
                found = self._drop(old, level, gfn)
                new |= found if new else 0
            elif old & ~AD == new:
                continue
            elif new and not (old ^ new) & PLACE:
                new |= old & AD
            if allows_less(old, new):
                self._is_stale = True
            self.memory.write_u64(slot, new)

    def _sync_all(self, table: int, gfn: int) -> None:
        """The same for all entries of a table of the last level."""
        old = number_of(self.memory.read(table, PAGE))
        new, is_less = update(old, leaves(self.p2m.words(gfn)))
        if new != old:
            self.memory.write(table, with_accessed(new, 0))
            self._is_stale |= is_less

    def _build(self, gfn: int, level: int, flags: int) -> int:
        """A new table for what begins at `gfn`; its pages get these accessed and dirty flags."""
        table = self._new_table()
        if level == 1:
            data = with_accessed(leaves(self.p2m.words(gfn)), flags)
        else:
            span, entries = 1 << 9 * (level - 1), []
            for first in range(gfn, gfn + 512 * span, span):
                entry = self._entry(first, level)
                if entry is None:
                    entry = self._build(first, level - 1, flags) | RWX
                elif entry:
                    entry |= flags
                entries.append(entry)
            data = array("Q", entries).tobytes()
        self.memory.write(table, data)
        return table

    def _drop(self, entry: int, level: int, gfn: int) -> int:
        """Free the tables below; returns the accessed and dirty flags found in them."""
        table, flags = entry & FRAME, 0
        if level == 2:
            self._leaves.pop(gfn >> 9, None)
        for n, child in enumerate(memoryview(self.memory.read(table, PAGE)).cast("Q")):
            if is_table(child, level - 1):
                flags |= self._drop(child, level - 1, gfn + (n << 9 * (level - 2)))
            elif child & RWX:
                flags |= child & AD
        self.tables.discard(table)
        self.reserve.release(table >> PAGE_SHIFT)
        return flags
