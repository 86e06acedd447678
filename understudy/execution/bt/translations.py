"""A vCPU's translations: made when the guest comes to code, gone when that is not so any more.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
"Software Virtualization".

Invariants: what is in the cache was translated from what the guest's tables led to when the guest
last expected them to be believed, and from bytes that nobody has written since.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.segment import Segment, SegmentName
from understudy.execution.bt import shown
from understudy.execution.bt.adaptation import Sites, Store, carry_out, store_of
from understudy.execution.bt.cache import CHUNK, Cache, Full, Unit
from understudy.execution.bt.layout import LARGEST, Layout
from understudy.execution.bt.library import Library
from understudy.execution.bt.sources import CodeFrames, Tables
from understudy.execution.bt.translate import MOST, Cut, hidden_from
from understudy.execution.bt.window import Window, choose, is_free, table_of
from understudy.execution.deprivileged.descriptors import BIG, FLAT, UNUSABLE, NotHere
from understudy.execution.deprivileged.instructions import Step
from understudy.execution.deprivileged.live import Live
from understudy.execution.vmx.guest_state import RIP
from understudy.instructions.operands import LONGEST, LOW32, MASK64
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.machine.words import PRESENT, Flag
from understudy.paging import Fault
from understudy.paging.guest_walk import Found, GuestFault, entries_of

EXPAND_DOWN: Final = 0x4
PROGRAM: Final = 3
PLACES_KEPT: Final = 2
"""Of the window, for which translations are kept on disk: the guest chooses how often it moves."""


class Translations(Live):
    """One vCPU's."""

    def begin_translations(self, host: Host, p2m: P2m) -> None:
        """Nothing is translated yet.  OutOfFrames: the host has no room."""
        self.space = Window(host)
        try:
            self.cache = Cache(host, Layout(0, 32))
        except OutOfFrames:
            self.space.close()
            raise
        self.tables, self.p2m = Tables(), p2m
        self.translated: Counter[str] = Counter()
        self._keeps = False  # translations on disk
        self._libraries: dict[Layout, Library] = {}
        self._steps_at: dict[int, Step] = {}  # by pc of a callout
        self.sites = Sites()
        self._stores_at: dict[int, Store | None] = {}  # by pc of a callout
        self.faulted: tuple[int, int] | None = None  # a copy's RIP; the trace faults before it
        self._loaded = 0  # hpa of the root by which it ran last
        self._unsure = True  # whether what was translated is what the guest's tables lead to
        self._written: set[int] = set()  # gfns that were protected, since the guest went on
        self._watched = -1  # gfn of the table that could map something where the window is
        self._is_watching = False  # for that: neither it nor the root has changed since it was seen
        self._is_flat = False  # its code and stack segments
        self._shown_flags = -1  # IF and IOPL as the window has them
        self._has_selectors = False  # the window
        self._returns = False  # whether IRET may execute
        self._may_change_if = True  # without a trap
        self.code_frames = CodeFrames.of(p2m)
        self.code_frames.guests.append(self)

    def end_translations(self) -> None:
        """Nothing is any more."""
        self.code_frames.guests.remove(self)
        self.cache.close()
        self.space.close()
        for library in self._libraries.values():
            library.save()

    def keep_translations(self) -> None:
        self._keeps = True

    def unit(self, gva: int) -> str:
        pc = self.cache.entries.get(gva, 0)
        code, unit = self.cache.code_at(pc), self.cache.unit_of(pc)
        if code is None or unit is None:
            raise ValueError(f"no code at {gva:#x} is translated now")
        return shown.text(code, unit.guest)

    # --- what it depends on ---

    def forget_walks(self) -> None:
        super().forget_walks()
        self._unsure = True
        self._is_watching = False

    def _leave(self) -> None:
        super()._leave()
        self._is_flat = self._has_selectors = False

    def set_live_segment(self, n: int, segment: Segment) -> None:
        super().set_live_segment(n, segment)
        self._is_flat = self._has_selectors = False

    def code_written(self, gfn: int) -> None:
        self.translated["dropped"] += self.cache.drop(gfn)
        self._written.add(gfn)

    def _would_write_again(self) -> bool:
        """Whether the frame that the instruction which comes next has written would be protected
        anew before it writes: it lies there itself, or it is the table of the window.

        From any other frame it goes on as it is, and finds this one unprotected.
        """
        written, self._written = self._written, set()
        if self._watched in written:
            return True
        if self.cpl() == PROGRAM:
            return False
        first = self._read_field(RIP) + self.segment_base(SegmentName.CS)
        for gva in {first, first + LONGEST - 1 & -PAGE}:
            try:
                found, _ = self._fetch(gva & (MASK64 if self.code_bits() == 64 else LOW32), 1)
            except NotHere:
                continue
            if found.gpa >> PAGE_SHIFT in written:
                return True
        return False

    def frames_changed(self, runs: Runs) -> None:
        mine = self.cache.by_frame
        for first, count in runs:
            if first <= self._watched < first + count:
                self._is_watching = False
            frames = [gfn for gfn in mine if first <= gfn < first + count] if count > 1 else [first]
            for gfn in frames:
                if gfn in mine and not self.p2m.word(gfn) & Flag.TRANSLATED:
                    self.translated["dropped"] += self.cache.drop(gfn)

    def has_code(self, gfn: int) -> bool:
        return gfn in self.cache.by_frame

    def _verify(self, bits: int) -> None:
        """Have a cache for this code, and nothing in it that the guest's tables do not lead to."""
        memory, control = self.kernel_memory(), self.paging_control()
        regime, read = memory.translation.regime, entries_of(memory.ram)
        layout = self.cache.layout
        if not (
            layout.bits == bits and layout.base and is_free(layout, regime, read)
            and self.tables.are_same(regime, control, memory.ram)
        ):  # fmt: skip
            new = choose(bits, control, read)
            if new is None:
                raise NotHere
            self._renew(new)
        self._unsure = False

    def _is_in_the_way(self) -> bool:
        """Whether the guest has mapped something where the window is: it need not tell of that."""
        if self._root() != self.space.root:
            return False
        memory = self.kernel_memory()
        return not is_free(self.cache.layout, memory.translation.regime, entries_of(memory.ram))

    def _watch_window(self) -> None:
        """Hear of it when the guest maps something there: it may use that at once."""
        self._is_watching, self._watched = True, -1
        if self._root() != self.space.root:
            return
        at = table_of(self.cache.layout, self.kernel_memory().translation.regime)
        if at is not None and self.p2m.word(at >> PAGE_SHIFT) & PRESENT:
            self._watched = at >> PAGE_SHIFT
            self.code_frames.hold(self.p2m, (self._watched,))

    def _renew(self, layout: Layout) -> None:
        """Begin anew."""
        self.translated["caches"] += 1
        before = self.cache
        self.cache = Cache(
            self.host, layout, is_virtual=self.is_virtual, hidden=hidden_from(self.model.shown),
            called_out=self.sites.called_out,
        )  # fmt: skip
        self.code_frames.let_go(self.p2m, before.by_frame)
        before.close()
        self.tables.clear()
        self._steps_at.clear()
        self._stores_at.clear()
        self._loaded = 0
        self._shown_flags, self._has_selectors, self._may_change_if = -1, False, True
        self.root_changed, self._is_watching = True, False
        self.space.show(self.cache)

    def _root(self) -> int:
        bits = self.cache.layout.bits if self.cache.layout.base else 0
        if (bits == 64) != self.is_long_mode() or not bits:
            return super()._root()
        return self.space.root

    # --- adaptation ---

    def traces(self) -> int:
        """Trace faults so far."""
        faults: dict[str, int] = self.view.paging.faults
        return faults[Fault.TRACE]

    def see_trace(self, rip: int, before: int) -> None:
        """A copy's page fault was answered: it may have been one too many on a traced table."""
        self.faulted = None
        if self.traces() != before and self.sites.trapped(rip):
            self.translated["called out"] += 1
            self.cache.drop_at(rip)

    def write_out(self, pc: int, step: Step) -> bool:
        """Carry out a write that is likely to a traced table.  False: the processor must."""
        rip, sites, stores = self.rip, self.sites, self._stores_at
        if pc not in stores:
            stores[pc] = store_of(step.instruction, self.cache.layout.bits)
        if (store := stores[pc]) is None:
            sites.refuse(rip)
            self.cache.drop_at(rip)
            return False
        is_done, is_guilty = True, False
        try:
            is_guilty = carry_out(self, store)
        except (GuestFault, NotHere):
            is_done = False
        self.translated["table writes"] += is_done
        if sites.wrote(rip, is_guilty):
            self.translated["copied again"] += 1
            self.cache.drop_at(rip)
        return is_done

    # --- units ---

    def _entry(self, rip: int) -> int:
        """The pc of the translation of the instruction there."""
        bits = self.code_bits()
        if bits == 16:
            raise NotHere
        if bits == 32 and not self._is_flat:
            self._check_flat()
        if self._unsure or self.cache.layout.bits != bits:
            self._verify(bits)
        pc = self.cache.entries.get(rip)
        return self._translate(rip) if pc is None else pc

    def _check_flat(self) -> None:
        """NotHere: code or stack segment are such that a translation would not work in them."""
        if self.is_long_mode():
            raise NotHere
        for n in (SegmentName.CS, SegmentName.SS):
            _, base, limit, rights = self.segment(n)
            bad = UNUSABLE | (EXPAND_DOWN if n == SegmentName.SS else 0)
            if base or limit != FLAT or rights & bad or not rights & BIG:
                raise NotHere
        self._is_flat = True

    def _translate(self, rip: int) -> int:
        """A unit."""
        found, raw = self._fetch(rip, PAGE)
        parts = [(rip, found)]
        pc, library, mask = self._room(), self._library(), self.cache.layout.mask
        kept = None if library is None else library.find(rip, raw, pc)
        if kept is not None and not self._has_called_out(kept[0].places(mask)):
            unit, out = kept
            self.translated["kept"] += 1
        else:
            try:
                code = self.cache.translate(pc, raw, rip)
            except Cut:
                found, more = self._fetch(rip + len(raw) & mask, LONGEST)
                raw += more
                parts.append((rip + len(raw) - 1, found))
                try:
                    code = self.cache.translate(pc, raw, rip)
                except Cut:
                    raise NotHere from None
            unit, out = Unit.of(code, raw), bytes(code.out)
            if library is not None and len(parts) == 1 and not self._has_called_out(code.starts):
                library.note(code, raw)
        told = self.translated
        told["units"] += 1
        told["instructions"] += unit.count
        told["copies"] += unit.copies
        told["bytes"] += len(out)
        unit.gfns = tuple({found.gpa >> PAGE_SHIFT for _, found in parts})
        memory, control = self.kernel_memory(), self.paging_control()
        for gva, found in parts:
            self.tables.note(memory.translation.regime, control, gva, found)
        self.code_frames.hold(self.p2m, unit.gfns)
        self.cache.add(unit, out)
        return pc

    def _has_called_out(self, places: Iterable[tuple[int, int]]) -> bool:
        """Whether an instruction there, by its `rip`, is called out: a unit for this run alone."""
        called_out = self.sites.called_out
        return bool(called_out) and any(rip in called_out for _, rip in places)

    def _library(self) -> Library | None:
        """What is kept on disk of translations for this window."""
        if not self._keeps:
            return None
        layout = self.cache.layout
        if layout not in self._libraries:
            if len(self._libraries) >= PLACES_KEPT:
                return None
            self._libraries[layout] = Library(
                layout, is_virtual=self.is_virtual, hidden=hidden_from(self.model.shown)
            )
        return self._libraries[layout]

    def _room(self) -> int:
        """The pc for one more unit."""
        try:
            if self.tables.are_many:
                raise Full
            pc, chunk = self.cache.room(LARGEST)
        except Full:
            self._renew(self.cache.layout)
            pc, chunk = self.cache.room(LARGEST)
        if chunk:
            self.space.show_code(len(self.cache.chunks) - 1, chunk, CHUNK)
        return pc

    def _fetch(self, gva: int, most: int) -> tuple[Found, bytes]:
        """Code, inside a page, and where it was found.  NotHere: it cannot be fetched."""
        memory = self.kernel_memory()
        try:
            found = memory.translation.find(memory.ram, gva, fetch=True)
            length = min(most, MOST * LONGEST, PAGE - gva % PAGE)
            return found, memory.ram.read(found.gpa, length)
        except GuestFault:
            raise NotHere from None

    def code(self, bits: int) -> bytes:
        if self.cpl() == PROGRAM:
            return super().code(bits)
        rip = self._read_field(RIP)
        if bits != 64:
            rip = rip + self.segment_base(SegmentName.CS) & LOW32
        try:
            raw = self._fetch(rip, LONGEST)[1]
        except NotHere:
            return b""
        try:
            return raw + self._fetch(rip + len(raw) & MASK64, LONGEST - len(raw))[1]
        except NotHere:
            return raw
