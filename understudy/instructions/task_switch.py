"""Task switches, which always exit in VMX operation: the hypervisor carries them out.

A kernel of 32 bits handles double faults, and its own debugging, through a task of its own.

Source: SDM 3A, "Task Switching"; SDM 3C, "Treatment of Task Switches".

Until the new TSS is read and the old one is written, a fault is the old task's; from the load of
TR on, it is the new one's and finds the new task's registers.
Invariants: nothing that a guest's tables contain raises here but the faults that they deserve;
after each of these ends the guest's state is one that a processor can be in.
"""

from dataclasses import replace
from typing import Final, NamedTuple

from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.segment import Segment
from understudy.guest import RSP, Event, Kind
from understudy.instructions.operands import LOW32, pieces
from understudy.instructions.surroundings import Surroundings
from understudy.paging.guest_walk import PAE_FORMAT, GuestFault, Regime, entries_of

CALL, IRET, JUMP, GATE = range(4)
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
SOFTWARE: Final = (Kind.SOFTWARE_INTERRUPT, Kind.SOFTWARE_EXCEPTION)
FLAGS: Final = 0x3F_7FD7  # those that exist
BUSY: Final = 1 << 1  # of a TSS descriptor's type
PRESENT, UNUSABLE, DEFAULT_BIG = 1 << 7, 1 << 16, 1 << 14  # of access rights
CODE_TYPE, CONFORMING, READ_WRITE, ACCESSED = 8, 4, 2, 1  # of a code or data segment's type
V86_RIGHTS: Final = 0xF3
LOCAL_BREAKPOINTS: Final = 0x155  # of DR7
TASK_TRAP: Final = 1 << 15  # BT of DR6


class Layout(NamedTuple):
    """Where things are in a TSS (SDM 3A, "Task-State Segment (TSS)", "16-Bit TSS")."""

    width: int
    ip: int
    flags: int
    registers: int
    segments: int
    segment_count: int
    ldt: int
    length: int


TSS16: Final = Layout(2, 0x0E, 0x10, 0x12, 0x22, 4, 0x2A, 0x2C)
TSS32: Final = Layout(4, 0x20, 0x24, 0x28, 0x48, 6, 0x60, 0x68)
TSS32_CR3, TSS32_TRAP = 0x1C, 0x64


class TaskFault(Exception):
    """A fault of the new task."""

    def __init__(self, vector: Vector, error: int = 0) -> None:
        super().__init__(vector, error)
        self.vector, self.error = vector, error


class Descriptor(NamedTuple):
    """A segment descriptor, as a `Segment` without its selector."""

    base: int
    limit: int
    rights: int

    @classmethod
    def of(cls, raw: int) -> "Descriptor":
        """SDM 3A, "Segment Descriptors"."""
        limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
        if raw >> 55 & 1:
            limit = limit << 12 | 0xFFF
        return cls(raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000, limit, raw >> 40 & 0xF0FF)

    @property
    def dpl(self) -> int:
        return self.rights >> 5 & 3

    @property
    def kind(self) -> int:
        """Type and S."""
        return self.rights & 0x1F


class TaskSwitch:
    """One switch."""

    def __init__(
        self, around: Surroundings, selector: int, source: int, event: Event | None, length: int
    ) -> None:
        self.around, self.guest = around, around.guest
        self.selector, self.source = selector, source
        self.event, self.length = event, length
        self.is_nested = source in (CALL, GATE)
        self.ext = int(event is not None and event.kind not in SOFTWARE)

    def carry_out(self) -> None:
        """GuestFault: of the old task.  TaskFault: of the new one, which is loaded."""
        descriptor = Descriptor.of(self._load(self._gdt(self.selector), 8))
        layout = TSS32 if descriptor.rights & 8 else TSS16
        image = self._load_bytes(descriptor.base, layout.length)
        self._save_old()
        if self.is_nested:
            self._store(descriptor.base, 2, self.guest.segment(TR).selector)
        else:
            old = self._gdt(self.guest.segment(TR).selector) + 5
            self._store(old, 1, self._load(old, 1) & ~BUSY)
        if self.source != IRET:
            self._store(self._gdt(self.selector) + 5, 1, descriptor.rights & 0xFF | BUSY)
        self._set(TR, self.selector, descriptor._replace(rights=descriptor.rights | BUSY))
        self._load_new(layout, image)

    # --- the old task ---

    def _save_old(self) -> None:
        guest = self.guest
        task = self.guest.segment(TR)
        base, layout = task.base, TSS32 if task.rights & 8 else TSS16
        flags = self.guest.rflags
        if self.source == IRET:
            flags &= ~RFLAGS.NT.mask
        is_hardware = self.event is not None and not self.event.kind.is_software
        ip = self.guest.rip + (0 if is_hardware else self.length)
        width = layout.width
        words = [(layout.ip, ip), (layout.flags, flags)]
        words += [(layout.registers + width * n, guest.gpr(n)) for n in range(8)]
        mask = (1 << 8 * width) - 1
        fields = [(at, width, value & mask) for at, value in words]
        fields += [
            (layout.segments + width * n, 2, self.guest.segment(n).selector)
            for n in range(layout.segment_count)
        ]
        for at, size, _ in fields:  # all or nothing
            self._places(base + at, size, write=True)
        for at, size, value in fields:
            self._store(base + at, size, value)

    # --- the new task ---

    def _load_new(self, layout: Layout, image: bytes) -> None:
        guest, width = self.guest, layout.width

        def word(at: int, size: int = width) -> int:
            return int.from_bytes(image[at : at + size], "little")

        flags = word(layout.flags) & FLAGS | 2
        if self.is_nested:
            flags |= RFLAGS.NT.mask
        guest = self.guest
        guest.rflags = flags
        guest.rip = word(layout.ip)
        for n in range(8):
            value = word(layout.registers + width * n)
            guest.set_gpr(n, value if width == 4 else value | 0xFFFF_0000)
        guest.dr7 &= ~LOCAL_BREAKPOINTS
        guest.end_shadow()
        if self.source == IRET:
            guest.unblock_nmis()
        if self.event is not None and self.event.kind is Kind.NMI:
            guest.block_nmis()
        selectors = [word(layout.segments + width * n, 2) for n in range(layout.segment_count)]
        selectors += [0] * (6 - layout.segment_count)
        is_v86 = bool(flags & RFLAGS.VM.mask)
        cpl = 3 if is_v86 else selectors[CS] & 3
        self._begin_with_nothing(selectors, cpl)
        self._load_control(word(TSS32_CR3, 4) if width == 4 else None)
        self._load_ldtr(word(layout.ldt, 2))
        if is_v86:
            for n, selector in enumerate(selectors):
                self._set(n, selector, Descriptor(selector << 4, 0xFFFF, V86_RIGHTS))
        else:
            self._load_code(selectors[CS])
            self._load_stack(selectors[SS], cpl)
            for n in (ES, DS, FS, GS):
                self._load_data(n, selectors[n], cpl)
        if guest.rip > guest.segment(CS).limit:
            raise TaskFault(Vector.GP, self.ext)
        if self.event is not None and self.event.error is not None:
            self._push(width, self.event.error)
        if width == 4 and image[TSS32_TRAP] & 1:
            guest.add_dr6(TASK_TRAP)
            raise TaskFault(Vector.DB)

    def _begin_with_nothing(self, selectors: list[int], cpl: int) -> None:
        """The new selectors without segments, but for what a VM entry insists on."""
        dpl = cpl << 5
        selectors = [*selectors[:SS], selectors[SS] & ~3 | cpl, *selectors[SS + 1 :]]
        for n, selector in enumerate(selectors):
            self._set(n, selector, Descriptor(0, 0, UNUSABLE | (dpl if n == SS else 0)))
        self._set(CS, selectors[CS], Descriptor(0, 0xFFFF, 0x409B | dpl))
        self._set(LDTR, 0, Descriptor(0, 0, UNUSABLE))

    def _load_control(self, cr3: int | None) -> None:
        guest = self.guest
        values = guest.control()
        values = values._replace(cr0=values.cr0 | CR0.TS.mask)
        if cr3 is None or not values.cr0 & CR0.PG.mask:
            guest.load_control(values)
            return
        if values.cr4 & CR4.PCIDE.mask:
            cr3 &= ~0xFFF
        values = values._replace(cr3=cr3)
        regime, problem = Regime(*values[:4]), False
        if regime.format is PAE_FORMAT:
            try:
                values = values._replace(pdptes=regime.load_pdptes(entries_of(self.around.memory)))
            except GuestFault:
                problem = True
        guest.load_control(values)
        if self.around.view.eptp:
            guest.forget_guest()
        else:
            self.around.view.cr3_write()
        if problem:
            raise TaskFault(Vector.GP)

    # --- segments ---

    def _load_ldtr(self, selector: int) -> None:
        if selector & ~3:
            descriptor = self._descriptor(selector) if not selector & 4 else None
            if descriptor is None or descriptor.rights & (PRESENT | 0x1F) != PRESENT | 2:
                raise self._fault(Vector.TS, selector)
            self._set(LDTR, selector, descriptor)

    def _load_code(self, selector: int) -> None:
        descriptor, rpl = self._descriptor(selector), selector & 3
        kind, dpl = descriptor.kind, descriptor.dpl
        fits = dpl <= rpl if kind & CONFORMING else dpl == rpl
        if kind & 0x18 != 0x18 or not fits:
            raise self._fault(Vector.TS, selector)
        if not descriptor.rights & PRESENT:
            raise self._fault(Vector.NP, selector)
        self._use(CS, selector, descriptor)

    def _load_stack(self, selector: int, cpl: int) -> None:
        descriptor = self._descriptor(selector)
        is_writable = descriptor.kind & (0x10 | CODE_TYPE | READ_WRITE) == 0x10 | READ_WRITE
        if not is_writable or selector & 3 != cpl or descriptor.dpl != cpl:
            raise self._fault(Vector.TS, selector)
        if not descriptor.rights & PRESENT:
            raise self._fault(Vector.SS, selector)
        self._use(SS, selector, descriptor)

    def _load_data(self, n: int, selector: int, cpl: int) -> None:
        if not selector & ~3:
            return
        descriptor = self._descriptor(selector)
        kind = descriptor.kind
        is_code = bool(kind & CODE_TYPE)
        is_readable = bool(kind & 0x10) and (not is_code or bool(kind & READ_WRITE))
        is_free = is_code and bool(kind & CONFORMING)
        if not is_readable or (not is_free and descriptor.dpl < max(selector & 3, cpl)):
            raise self._fault(Vector.TS, selector)
        if not descriptor.rights & PRESENT:
            raise self._fault(Vector.NP, selector)
        self._use(n, selector, descriptor)

    def _fault(self, vector: Vector, selector: int) -> TaskFault:
        return TaskFault(vector, selector & ~3 | self.ext)

    def _descriptor(self, selector: int) -> Descriptor:
        """Of the GDT or the LDT; #TS if there is none."""
        base, limit = self.guest.gdtr()
        is_usable = True
        if selector & 4:
            _, base, limit, rights = self.guest.segment(LDTR)
            is_usable = not rights & UNUSABLE
        if not selector & ~3 or not is_usable or selector | 7 > limit:
            raise self._fault(Vector.TS, selector)
        return Descriptor.of(self._load(base + (selector & ~7), 8))

    def _use(self, n: int, selector: int, descriptor: Descriptor) -> None:
        """Load a code or data segment; its descriptor is marked as accessed."""
        if not descriptor.rights & ACCESSED:
            descriptor = descriptor._replace(rights=descriptor.rights | ACCESSED)
            guest = self.guest
            table = guest.segment_base(LDTR) if selector & 4 else guest.gdtr().base
            self._store(table + (selector & ~7) + 5, 1, descriptor.rights & 0xFF)
        self._set(n, selector, descriptor)

    def _set(self, n: int, selector: int, descriptor: Descriptor) -> None:
        self.guest.set_segment(n, Segment(selector, *descriptor))

    def _push(self, width: int, value: int) -> None:
        """The error code, on the new task's stack."""
        _, base, limit, rights = self.guest.segment(SS)
        mask = LOW32 if rights & DEFAULT_BIG else 0xFFFF
        sp = self.guest.gpr(RSP)
        at = sp - width & mask
        grows_down = bool(rights & CONFORMING)  # of a data segment: expand-down
        is_outside = at <= limit if grows_down else at + width - 1 > limit
        if is_outside:
            raise TaskFault(Vector.SS, self.ext)
        self._store(base + at, width, value)
        self.guest.set_gpr(RSP, sp & ~mask | at)

    # --- memory, as the processor accesses its own structures ---

    def _gdt(self, selector: int) -> int:
        return self.guest.gdtr().base + (selector & ~7)

    def _places(self, gva: int, size: int, *, write: bool = False) -> list[tuple[int, int]]:
        """(gpa, bytes) of each page's part; supervisor accesses at any level."""
        translation = replace(self.around.translation(), cpl=0, ac=False)
        memory = self.around.memory
        return [
            (translation.gpa(memory, at & LOW32, write=write), part)
            for at, part in pieces(gva, size)
        ]

    def _load_bytes(self, gva: int, size: int) -> bytes:
        memory = self.around.memory
        return b"".join(memory.read(gpa, part) for gpa, part in self._places(gva, size))

    def _load(self, gva: int, size: int) -> int:
        return int.from_bytes(self._load_bytes(gva, size), "little")

    def _store(self, gva: int, size: int, value: int) -> None:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        for gpa, part in self._places(gva, size, write=True):
            self.around.memory.write(gpa, data[:part])
            data = data[part:]
