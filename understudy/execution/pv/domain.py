"""A paravirtual guest as calls of the hypervisor see it: what it has told, and what both share.

Source: ours (`interface`); P. Barham et al., "Xen and the Art of Virtualization", SOSP 2003.
Invariant: what stands in the shared page is looked at when it is used, and believed of nothing but
the guest's own state.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT, is_canonical
from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.execution.deprivileged.descent import PROGRAM
from understudy.execution.deprivileged.live import Live
from understudy.execution.pv import interface as pv
from understudy.execution.pv.interface import Change, Shared, State
from understudy.guest import RSP
from understudy.instructions.operands import LOW32, MASK64
from understudy.paging.pv import DATA, PvView, Refused

IF: Final = RFLAGS.IF.mask
MOST_WALKED: Final = 1024  # page tables, in the changes of one call
GIVEN: Final = int(RFLAGS(CF=1, PF=1, AF=1, ZF=1, SF=1, DF=1, OF=1, AC=1, ID=1, TF=1))
"""What of RFLAGS a return may set, beside IF."""
TS: Final = CR0.TS.mask
FS_BASE: Final = int(Vmcs.GUEST_FS_BASE)
CODE64, CODE32, DATA32 = 0xA09B, 0xC09B, 0xC093
NO_WATCH: Final = 0x400  # of DR7
WATCH_BITS: Final = 0xF_0003  # of DR7: breakpoint 0


class Domain(Live):
    """One vCPU's."""

    view: PvView

    def begin_counts(self) -> None:
        """Nothing has happened."""
        self.calls: Counter[str] = Counter()  # of the hypervisor, by name
        self.refused: Counter[str] = Counter()  # of these, by call
        self.last_refused = ""  # what was wrong, in words
        self.updates_made = 0  # changes of page tables
        self.synchronized = 0  # times that state of the guest's was looked at on the way to it

    def refuse(self, call: str, problem: str) -> None:
        """Note what the guest is not given."""
        self.refused[call] += 1
        self.last_refused = problem

    def forget_domain(self) -> None:
        """The guest has told nothing."""
        self.entry = 0  # where events go
        self.shared = 0  # hpa of the page that both write; 0: none
        self.kernel_stack = 0
        self.has_virtual_if = False
        self.watch, self.watching = 0, NO_WATCH

    # --- the shared page ---

    def start(self, entry: int, pfn: int, features: int) -> None:
        """The guest says where its events go and which page is shared.  Refused: it has before."""
        if self.shared:
            raise Refused("the guest has started")
        self.view.paging.take(pfn, DATA)  # for good: it never becomes a page table
        self.entry, self.shared = entry, pfn << PAGE_SHIFT
        self.has_virtual_if = bool(features & pv.Feature.VIRTUAL_IF)
        self.put(Shared.TSC_OFFSET, self.read(Vmcs.TSC_OFFSET))

    def get(self, what: Shared) -> int:
        """64 bits of the shared page."""
        return self.host.memory.read_u64(self.shared + what)

    def put(self, what: Shared, value: int) -> None:
        """Set them."""
        if self.shared:
            self.host.memory.write_u64(self.shared + what, value & MASK64)

    # --- levels ---

    @property
    def is_code_64(self) -> bool:
        """Whether the guest is a 64-bit one."""
        return self.view.paging.levels == 4

    def go_to(self, level: int) -> None:
        """The segments of level 0 or 3."""
        code = CODE64 if self.is_code_64 else CODE32
        cs, ss = (pv.USER_CS, pv.USER_SS) if level else (pv.KERNEL_CS, pv.KERNEL_SS)
        dpl = level << 5
        self.set_live_segment(SegmentName.SS, Segment(ss, 0, LOW32, DATA32 | dpl))
        self.set_live_segment(SegmentName.CS, Segment(cs, 0, LOW32, code | dpl))

    def return_from_event(self) -> None:
        """AX, vector, error code, IP, CS, flags, SP, SS lie on the stack.  GuestFault: they do not.

        Refused: that is no place to return to.
        """
        word, rsp = (8, self.gpr(RSP)) if self.is_code_64 else (4, self.gpr(RSP) & LOW32)
        data = self.read_kernel(rsp, 8 * word)
        ax, _, _, ip, cs, flags, sp, _ = (
            int.from_bytes(data[n : n + word], "little") for n in range(0, len(data), word)
        )
        if self.is_code_64 and not is_canonical(ip):
            raise Refused(f"a return to {ip:#x}")
        if cs & 3:
            self._make_queued()
        self.write_gpr(0, ax)
        self.set_gpr(RSP, sp)
        self.rip, self.rflags = ip, flags & (GIVEN | IF) | 2
        if cs & 3:
            self.go_to(PROGRAM)
            self.synchronize()

    # --- page tables ---

    def change_tables(self, at: int, count: int) -> None:
        """Make the changes in the list there.  Refused: one of them, and those behind it."""
        if not 0 <= count <= pv.MOST_UPDATES:
            raise Refused(f"{count} changes at once")
        items = memoryview(self.read_kernel(at, 16 * count)).cast("Q")
        self.updates_made += count
        done, before = 0, self.view.paging.walked
        try:
            for done in range(count):
                if self.view.paging.walked - before > MOST_WALKED:
                    raise Refused("so many page tables at once")
                self._change(items[2 * done], items[2 * done + 1])
        except Refused as problem:
            raise Refused(f"change {done}: {problem}") from None
        finally:
            if not self.is_code_64:
                self.root_changed = True  # the processor has copies of its entries

    def _change(self, where: int, value: int) -> None:
        paging = self.view.paging
        match where & 7:
            case Change.ENTRY:
                paging.update(where, value)
            case Change.INVALIDATE:
                self.invalidate([value])
            case Change.PIN:
                paging.pin(where >> PAGE_SHIFT)
            case Change.UNPIN:
                paging.unpin(where >> PAGE_SHIFT)
            case Change.LOAD:
                self.view.load(where & ~7)
            case kind:
                raise Refused(f"a change of kind {kind}")

    def _make_queued(self) -> None:
        """What goes with a return to a program."""
        if self.shared and (count := self.get(Shared.QUEUED)):
            self.put(Shared.QUEUED, 0)
            self.change_tables(self.get(Shared.QUEUE), count)

    # --- interrupts ---

    def set_interrupt_flag(self, is_on: bool) -> None:
        """The guest's; what waits comes next."""
        flags = self.rflags
        self.rflags = flags | IF if is_on else flags & ~IF

    # --- memory of the kernel ---

    def read_kernel(self, gva: int, length: int) -> bytes:
        """Read it.  GuestFault."""
        return b"".join(
            self.host.memory.read(self.view.reach(at, write=False), part)
            for at, part in _pages(gva, length)
        )

    def write_kernel(self, gva: int, data: bytes) -> None:
        """Write it.  GuestFault: nothing is written."""
        places = [(self.view.reach(at, write=True), part) for at, part in _pages(gva, len(data))]
        for hpa, part in places:
            self.host.memory.write(hpa, data[:part])
            data = data[part:]

    # --- what programs have of the processor ---

    def synchronize(self) -> None:
        """The guest goes to a program: what it has changed in the shared page counts from now."""
        if not self.shared:
            return
        changed = self.get(Shared.CHANGED) & LOW32
        if not changed:
            return
        self.synchronized += 1
        fpu_off = self.get(Shared.CHANGED) >> 32
        self.put(Shared.CHANGED, fpu_off << 32)
        if changed & State.STACK:
            self.kernel_stack = self.get(Shared.STACK)
        if changed & State.TLS:
            self.set_tls(self.get(Shared.TLS))
        if changed & State.FPU:
            self.set_task_switched(bool(fpu_off))
        if changed & State.WATCH:
            self.set_watch(self.get(Shared.WATCH), self.get(Shared.WATCHING))

    def set_tls(self, base: int) -> None:
        """FS's base in 64-bit programs, GS's in others."""
        if not self.is_code_64:
            rights = DATA32 | PROGRAM << 5
            segment = Segment(pv.TLS_SELECTOR, base & LOW32, LOW32, rights)
            self.set_live_segment(SegmentName.GS, segment)
        elif is_canonical(base):
            self.write(FS_BASE, base)

    def set_task_switched(self, is_on: bool) -> None:
        """CR0.TS."""
        old = self._read_field(Vmcs.GUEST_CR0)
        cr0 = old | TS if is_on else old & ~TS
        if cr0 != old:
            self._write_field(Vmcs.GUEST_CR0, cr0)
            self.updates["cr0"] = cr0

    def set_watch(self, address: int, control: int) -> None:
        """Breakpoint 0, on data."""
        kinds = control >> 16 & 3
        self.watching = NO_WATCH | (control & WATCH_BITS if kinds in (1, 3) else 0)
        self.watch = address & (MASK64 if self.is_code_64 else LOW32)
        self.updates |= {"dr0": self.watch, "dr7": self.watching}


def _pages(gva: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of this, page by page."""
    while length > 0:
        part = min(length, PAGE - gva % PAGE)
        yield gva, part
        gva, length = gva + part, length - part
