"""A guest of a few instructions, whose tables are edited, flushed, loaded and used at random.

What: a VM that does one access, or one privileged instruction, at a time, compared with the oracle.
Source: none.  Invariants checked: *never stale* (what the processor does, the tables allow, or
allowed when the address was last invalidated; under `eager`, allow now), *eventually complete*
(what they allow now succeeds), and exactly: error codes, CR2, data, accessed and dirty flags.
"""

from typing import Any, Final, NamedTuple, cast

from tests.property.frame_game import FrameGame
from tests.property.paging_oracle import (
    IA32,
    INTEL64,
    PAE,
    A,
    Access,
    D,
    Mode,
    Oracle,
    Outcome,
    Shape,
)
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.paging.budget import TABLE_BYTES, Budgeted
from understudy.vcpu.activity import Activity, Goal
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop, StopKind, Verdict
from understudy.vm import VM

CODE_GFN, FIXED_GFN = 0x10, 0x20
TABLES: Final = (*range(0x100, 0x107), 0x600, 0x601, 0x602, 0x800, 0x801)
"""The last ones are where large pages begin, which are touched at their first two frames."""
ROOTS: Final = TABLES[:2]
DATA: Final = (0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0, 1, 0x400, 0x401, 0xA00, 0xA01)
FORMATS: Final = {"IA-32": IA32, "PAE": PAE, "Intel 64": INTEL64}
CPUID: Final = b"\x0f\xa2"
WORD, LANDING = 8, 0x40  # where a page is read and written, and where it is executed
STRIDE: Final = 32
MANY: Final = 1000  # exits: an access that is not done by then never will be

GADGETS: Final = {
    "load": b"\x8b\x07", "store": b"\x89\x07", "store64": b"\x48\x89\x07", "xchg": b"\x87\x07",
    "or": b"\xf0\x09\x07", "and": b"\xf0\x21\x07", "add": b"\x01\x07", "xadd": b"\xf0\x0f\xc1\x07",
    "stos": b"\xf3\xab", "invlpg": b"\x0f\x01\x3f", "cr3": b"\x0f\x22\xdf", "cr4": b"\x0f\x22\xe7",
    "cr0": b"\x0f\x22\xc7", "wrmsr": b"\x0f\x30", "wrpkru": b"\x0f\x01\xef",
}  # fmt: skip
EDITS: Final = ("store", "xchg", "or", "and", "add", "xadd", "stos")
PLACES: Final = {name: n * STRIDE for n, name in enumerate(GADGETS)}

CR0, WP = 0x8000_0031, 1 << 16
CR4_PSE, CR4_PAE, PGE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 20, 1 << 21
PKE = 1 << 22
LOW32 = 0xFFFF_FFFF
EFER_MSR, NXE, LONG = 0xC000_0080, 1 << 11, 0x500
FLAGS = A | D


class Done(NamedTuple):
    """What an instruction came to: a fault (error code, CR2), or EAX."""

    error: int | None
    cr2: int
    eax: int


class Machine(FrameGame):
    """The VM under test and the oracle beside it."""

    def __init__(
        self, paging: str, shape: Shape, pages: list[int], room: int, cpus: int = 1
    ) -> None:
        """`pages`: the addresses that will be used.  `room`: for so many tables; 0: for all."""
        self.pages = pages
        self.shape, self.is_long = shape, shape is INTEL64
        self.vm = VM("16M", paging=paging, cpu="understudy,+smap", cpus=cpus)
        if room and isinstance(self.vm.pages, Budgeted):
            self.vm.pages.limit = room * TABLE_BYTES
        self.is_ept, self.is_strict = paging == "ept", paging == "eager"
        self.oracle = Oracle(shape, {gfn: bytearray(4096) for gfn in (*TABLES, *DATA)})
        for gfn in DATA:
            tag = (0x5AFE_0000 | gfn << 1).to_bytes(4, "little")  # as an entry, not present
            self.oracle.memory[gfn][WORD : WORD + 4] = tag
            self.oracle.memory[gfn][LANDING : LANDING + 2] = CPUID
        for gfn, content in self.oracle.memory.items():
            self.vm.memory.write(gfn << 12, content)
        for name, code in GADGETS.items():
            self.vm.memory.write((CODE_GFN << 12) + PLACES[name], code + CPUID)
        self._fixed_tables()
        mode = self.oracle.mode = Mode()
        mode.nxe = shape is not IA32
        self.cr0, self.efer = CR0 | WP, (NXE if mode.nxe else 0) | (LONG if self.is_long else 0)
        self.cr4 = PGE | (CR4_PSE if shape is IA32 else CR4_PAE)
        self.oracle.root = ROOTS[0] << 12
        FrameGame.__init__(self, self.vm)
        for vcpu in reversed(self.vm.vcpus):
            self._begin(vcpu)

    def _begin(self, vcpu: Vcpu) -> None:
        """Have a processor translate by the tables as they are."""
        self.vcpu, self.guest = vcpu, cast(Any, vcpu.guest)
        vcpu.state.activity = Activity.ACTIVE
        vcpu.table[Reason.CPUID] = _stop
        vcpu.set_registers(
            {"cr0": self.cr0, "cr3": self.oracle.root, "cr4": self.cr4, "efer": self.efer}
        )
        self.load_cr3(ROOTS[0], is_first=True)
        if self.is_ept:
            vcpu.table[Reason.EXCEPTION_OR_NMI] = _true_fault
            self.guest.write(Vmcs.EXCEPTION_BITMAP, 1 << 14)

    def close(self) -> None:
        for pfn in self.homes.values():
            self.vm.host.release(pfn)
        self.vm.close()

    def _fixed_tables(self) -> None:
        """A window for the code and the tables, at the end of the linear addresses."""
        size = self.shape.entry_bytes
        at = FIXED_GFN
        flags = 0x67  # present, writable, user, accessed, dirty
        tops = [(gfn, (4096 // size - 1) * size) for gfn in ROOTS]
        if self.shape is PAE:
            tops = [(gfn, 3 * 8) for gfn in ROOTS]
        for gfn, offset in tops:
            top = at << 12 | (1 if self.shape is PAE else flags)
            self.oracle.memory[gfn][offset : offset + size] = top.to_bytes(size, "little")
            self.vm.memory.write((gfn << 12) + offset, top.to_bytes(size, "little"))
        for _ in range(len(self.shape.shifts) - 2):
            entry = (at + 1) << 12 | flags
            self.vm.memory.write((at << 12) + 4096 - size, entry.to_bytes(size, "little"))
            at += 1
        window = [CODE_GFN << 12 | 0x61, CODE_GFN << 12 | 0x65]  # for the supervisor, for users
        window += [gfn << 12 | 0x63 for gfn in TABLES]
        data = b"".join(entry.to_bytes(size, "little") for entry in window)
        first = 4096 // size - 32
        self.vm.memory.write((at << 12) + first * size, data)
        top = (1 << 64 if self.is_long else 1 << 32) - (32 << 12)
        self.kernel_code, self.user_code, self.tables_gva = top, top + 0x1000, top + 0x2000

    # --- instructions ---

    def run(self, rip: int, *, user: bool = False, ac: bool = False, rdi: int = 0,
            eax: int = 0, ecx: int = 0) -> Done:  # fmt: skip
        """Execute from `rip` to the next CPUID, or to a fault."""
        self.begin(rip, user=user, ac=ac, rdi=rdi, eax=eax, ecx=ecx)
        return self.finish()

    def begin(self, rip: int, *, user: bool = False, ac: bool = False, rdi: int = 0,
              eax: int = 0, ecx: int = 0) -> None:  # fmt: skip
        """Have it execute from there, when it goes on."""
        vcpu, write, processor = self.vcpu, self.guest.write, self.guest.processor
        vcpu.leave_guest()
        rpl = 3 if user else 0
        dpl = rpl << 5
        write(Vmcs.GUEST_CS, 0x08 | rpl)
        write(Vmcs.GUEST_SS, 0x10 | rpl)
        write(Vmcs.GUEST_RIP, rip)
        write(Vmcs.GUEST_RFLAGS, 2 | ac << 18)
        write(Vmcs.GUEST_CS_ACCESS_RIGHTS, (0xA09B if self.is_long else 0xC09B) | dpl)
        write(Vmcs.GUEST_SS_ACCESS_RIGHTS, 0xC093 | dpl)
        processor.set_gpr(7, rdi)
        processor.set_gpr(0, eax)
        processor.set_gpr(1, ecx)

    def finish(self) -> Done:
        """Go on to the next CPUID, or to a fault."""
        vcpu, processor = self.vcpu, self.guest.processor
        events, exits = vcpu.events.state, iter(range(MANY))
        stop = vcpu.run(Goal(None, lambda: events.staged is not None or next(exits, None) is None))
        assert isinstance(stop, Stop)
        if stop.kind == StopKind.DEBUG_EXIT:
            return Done(None, 0, processor.gpr(0) & 0xFFFF_FFFF)
        event, events.staged = events.staged, None
        assert event is not None and event.vector == 14, (event, stop)
        return Done(event.error, processor.registers()["cr2"], 0)

    def gadget(self, name: str, **registers: Any) -> Done:
        base = self.user_code if registers.get("user") else self.kernel_code
        return self.run(base + PLACES[name], **registers)

    def must(self, name: str, **registers: Any) -> None:
        done = self.gadget(name, **registers)
        assert done.error is None, f"{name}: #PF({done.error:#x}) at {done.cr2:#x}"

    # --- what the guest does ---

    def edit(self, gfn: int, index: int, value: int, how: str) -> None:
        """Change an entry of a table by an instruction of the guest."""
        size = self.shape.entry_bytes
        for part in range(size // 4):
            offset = index * size + 4 * part
            new = value >> 32 * part & LOW32
            old = int.from_bytes(self.oracle.memory[gfn][offset : offset + 4], "little")
            operand, name = new, how
            if how in ("add", "xadd"):
                operand = new - old & LOW32
            elif (how == "or" and old & ~new) or (how == "and" and new & ~old):
                name = "store"
            gva = self.tables_gva + (TABLES.index(gfn) << 12) + offset
            self.must(name, rdi=gva, eax=operand, ecx=1)
            self.oracle.write((gfn << 12) + offset, new.to_bytes(4, "little"))
        self.compare()

    def frames_of(self, gva: int) -> list[int]:
        """The frames that a walk of this address uses, the page's first."""
        outcome = self.oracle.fresh(Access(gva, ac=True))
        page = [] if outcome.error is not None else [outcome.gpa >> 12]
        return [*page, *reversed([gpa >> 12 for gpa in outcome.path])]

    def entry_of(self, gva: int, depth: int) -> tuple[int, int] | None:
        """The table and index of the entry of an address's walk at this depth, if it gets there."""
        path = self.oracle.fresh(Access(gva)).path
        if self.shape is PAE:
            depth -= 1
        if not 0 <= depth < len(path):
            return None
        gpa = path[depth]
        return gpa >> 12, (gpa & 0xFFF) // self.shape.entry_bytes

    def edit_by_device(self, gfn: int, index: int, value: int) -> None:
        """Something else than the processor writes to a table."""
        size = self.shape.entry_bytes
        self.vcpu.leave_guest()
        data = value.to_bytes(size, "little")
        self.vm.memory.write((gfn << 12) + index * size, data)
        self.oracle.write((gfn << 12) + index * size, data)

    def invlpg(self, gva: int) -> None:
        oracle, shift = self.oracle, self._size_of(gva)
        together = [] if not shift else [
            page for page in self.pages
            if page >> shift == gva >> shift and self._size_of(page) == shift
        ]  # fmt: skip
        self.must("invlpg", rdi=gva)
        for page in together:
            oracle.sync(page)
        oracle.sync(gva)

    def _size_of(self, gva: int) -> int:
        """The size (a shift) of the large page as part of which an address must be cached, or 0."""
        outcomes = self.oracle.outcomes(Access(gva, ac=True))
        sizes = {one.shift if one.error is None else 0 for one in outcomes}
        return sizes.pop() if len(sizes) == 1 and max(sizes) > 12 else 0

    def load_cr3(self, gfn: int, *, is_first: bool = False) -> None:
        if not is_first:
            self.must("cr3", rdi=gfn << 12)
        oracle = self.oracle
        oracle.root = gfn << 12
        if self.shape is PAE:
            oracle.pdptes = tuple(oracle.entry((gfn << 12) + 8 * n) for n in range(4))
        oracle.sync_all()

    def set_mode(self, mode: Mode) -> None:
        """Write CR0, EFER and CR4 (which flushes everything)."""
        if self.shape is IA32:
            mode.nxe = False
        self.must("cr0", rdi=self.cr0 & ~WP | (WP if mode.wp else 0))
        if self.shape is not IA32:
            self.must("wrmsr", ecx=EFER_MSR, eax=self.efer & ~NXE | (NXE if mode.nxe else 0))
        cr4 = self.cr4 & ~(SMEP | SMAP | PKE)
        cr4 |= (SMEP if mode.smep else 0) | (SMAP if mode.smap else 0)
        cr4 |= PKE if mode.pkru is not None else 0
        self.must("cr4", rdi=cr4 & ~PGE)
        self.must("cr4", rdi=cr4)
        if mode.pkru is not None:
            self.must("wrpkru", eax=mode.pkru)
        self.oracle.mode = mode
        if self.shape is PAE:
            root = self.oracle.root
            self.oracle.pdptes = tuple(self.oracle.entry(root + 8 * n) for n in range(4))
        self.oracle.sync_all()

    def touch(self, access: Access, value: int) -> None:
        """One access; everything about it is compared with the oracle."""
        oracle = self.oracle
        offset = LANDING if access.fetch else WORD
        access = access._replace(gva=access.gva + offset)
        fresh, allowed = oracle.fresh(access), oracle.outcomes(access)
        if self.is_strict:
            allowed = {fresh}
        pages = [one for one in allowed if one.error is None]
        if access.fetch and any(one.gpa >> 12 not in DATA for one in pages):
            return  # it would execute a table
        if access.fetch:
            done = self.run(access.gva, user=access.user, ac=access.ac)
        else:
            done = self.gadget("store" if access.write else "load", rdi=access.gva, eax=value,
                               user=access.user, ac=access.ac)  # fmt: skip
        words = f"{self.vm.pages.name}, {self.shape.name}: {access} -> {done}"
        if done.error is not None:
            assert done.error == fresh.error, f"{words}; expected {fresh}"
            assert done.cr2 == access.gva, words  # and no flag is set
        else:
            assert pages, f"{words}; expected {fresh}"
            self._reached(access, value, done, pages, fresh, words)
        self.compare()

    def _reached(self, access: Access, value: int, done: Done, pages: list[Outcome],
                 fresh: Outcome, words: str) -> None:  # fmt: skip
        """The access succeeded: it must have gone to one of `pages`."""
        if not access.write:
            if not access.fetch:
                # (The walk may have set flags in the very entry that was read.)
                pages = [one for one in pages if not (self._word(one.gpa) ^ done.eax) & ~FLAGS]
            assert pages, f"{words}; expected {fresh}"
            self._flags(pages, access, pages[0].path)
            return
        pages = [one for one in pages if self._real_word(one.gpa) == value]
        assert pages, f"{words}; expected {fresh}"
        changed = [one for one in pages if self._word(one.gpa) != value]
        target = (changed or pages)[0]
        self._flags(pages, access, target.path)
        self.oracle.write(target.gpa, value.to_bytes(4, "little"))

    def _flags(self, outcomes: list[Outcome], access: Access, path: tuple[int, ...]) -> None:
        """The flags that the walk has set, or, if something may be cached, may have set."""
        oracle = self.oracle
        paths = {one.path for one in outcomes} | {path}
        is_settled = self.is_strict or all(oracle.is_settled(one, access.gva) for one in paths)
        for one in paths:
            for n, gpa in enumerate(one):
                flags = FLAGS if access.write and n == len(one) - 1 else A
                if not is_settled or len(paths) > 1:
                    flags &= self._real_word(gpa, self.shape.entry_bytes)
                oracle.set_flags(gpa, flags)

    # --- comparing ---

    def _real_word(self, gpa: int, size: int = 4) -> int:
        return int.from_bytes(self.real(gpa >> 12)[gpa & 0xFFF :][:size], "little")

    def _word(self, gpa: int) -> int:
        at = gpa & 0xFFF
        return int.from_bytes(self.oracle.memory[gpa >> 12][at : at + 4], "little")

    def compare(self) -> None:
        """The guest's tables hold what the oracle says, bit for bit."""
        for gfn in (*TABLES, *DATA):
            real, expected = self.real(gfn), self.oracle.memory[gfn]
            if real != expected:
                at = next(n for n in range(0, 4096, 8) if real[n : n + 8] != expected[n : n + 8])
                raise AssertionError(
                    f"{self.vm.pages.name}, {self.shape.name}: table {gfn:#x} at {at:#x}: "
                    f"{real[at : at + 8][::-1].hex()}, expected {expected[at : at + 8][::-1].hex()}"
                )
        for gfn, content in self.sealed.items():
            assert self.real(gfn) == content, f"frame {gfn:#x} was written while it was protected"


def _stop(vcpu: Vcpu, exit: Any) -> Stop:
    return Stop(StopKind.DEBUG_EXIT)


def _true_fault(vcpu: Vcpu, exit: Any) -> Verdict:
    """Under EPT page faults do not exit by themselves; here they do, to be looked at."""
    vcpu.guest.set_cr2(exit.qualification)
    return vcpu.fault(14, exit.intr_error)
