"""A paravirtual guest of a few instructions, and an audit of what its hypervisor has noted of it.

Source: ours; understudy/execution/pv/interface.py.
Invariant: the audit knows nothing but the guest's own tables, from its roots down.
"""

import struct
from collections import Counter
from collections.abc import Sequence

from understudy.arch.address import PAGE
from understudy.execution.pv import Pv
from understudy.execution.pv.interface import Call, Change
from understudy.guests import elf, pv
from understudy.machine.host import Host
from understudy.paging.pv import DATA, PvPaging
from understudy.verdict import StopKind
from understudy.vm import VM

BASES = {64: 0xFFFF_FFFF_8000_0000, 32: 0xC000_0000}
CODE = 0x10_0000  # gpa of the program; then of a page of data, and of one for a list of changes
STACK_TOP, LIST, SHARED = CODE + 0x2000, CODE + 0x2000, CODE + 0x3000
BYTES = 0x10000
CALL_FOR_EVER = bytes.fromhex("cd 82 eb fc")  # int 82h; jmp back
PRESENT, WRITABLE, USER = 1, 2, 4
MASK64 = (1 << 64) - 1


def image(bits: int, code: bytes) -> elf.Image:
    """The program as a kernel with the note."""
    base, note = BASES[bits], struct.pack("<III", 11, 4, 1) + b"understudy\0\0" + b"\1\0\0\0"
    identity = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    head, row = (64, 56) if bits == 64 else (52, 32)
    note_at, code_at = head + 2 * row, 0x1000
    if bits == 64:
        raw = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, base + CODE, head, 0, 0, head,
                          row, 2, 0, 0, 0)  # fmt: skip
        rows = struct.pack("<IIQQQQQQ", 1, 7, code_at, base + CODE, CODE, len(code), BYTES, PAGE)
        rows += struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    else:
        raw = struct.pack("<16sHHIIIIIHHHHHH", identity, 2, 3, 1, base + CODE, head, 0, 0, head,
                          row, 2, 0, 0, 0)  # fmt: skip
        rows = struct.pack("<8I", 1, code_at, base + CODE, CODE, len(code), BYTES, 7, PAGE)
        rows += struct.pack("<8I", 4, note_at, 0, 0, len(note), len(note), 4, 4)
    return elf.parse((raw + rows + note).ljust(code_at, b"\0") + code)


class PvGuest:
    """A VM with it; whoever has it closes `vm`."""

    def __init__(
        self, bits: int = 64, code: bytes = CALL_FOR_EVER, host: Host | None = None
    ) -> None:
        self.base = BASES[bits]
        self.vm = VM("4M", execution="pv", paging="pv", host=host)
        try:
            program = image(bits, code)
            self.vm.boot(lambda machine: pv.load(machine.memory, program, append=""))
        except BaseException:
            self.vm.close()
            raise
        guest, paging = self.vm.vcpus[0].guest, self.vm.pages
        assert isinstance(guest, Pv) and isinstance(paging, PvPaging)
        self.guest, self.paging = guest, paging
        self.guest.set_gpr(4, self.base + STACK_TOP)
        info = CODE + BYTES
        _, self.first_free, self.root, self.direct, _ = struct.unpack(
            "<5Q", self.vm.memory.read(info, 40)
        )

    def call(self, number: int, *arguments: int) -> int:
        """Have it call, and what comes of it."""
        for register, value in zip((0, 3, 1, 2), (number, *arguments), strict=False):
            self.guest.write_gpr(register, value & MASK64)
        before = sum(self.guest.calls.values())
        stop = self.vm.go(budget=1000, until=lambda: sum(self.guest.calls.values()) > before)
        assert stop.kind is StopKind.UNTIL, stop
        bits = 64 if self.guest.is_code_64 else 32
        value = self.guest.gpr(0) & (1 << bits) - 1
        return value - (1 << bits) if value >> bits - 1 else value

    def start(self, entry: int = CODE) -> None:
        """The first call."""
        assert self.call(Call.START, self.base + entry, SHARED, 1) == 0
        assert self.call(Call.SET_STACK, self.base + STACK_TOP) == 0

    def change(self, *items: tuple[int, int]) -> int:
        """Ask for changes of page tables."""
        self.vm.memory.write(LIST, b"".join(struct.pack("<QQ", *item) for item in items))
        return self.call(Call.UPDATE, self.base + LIST, len(items))

    def hpa(self, gpa: int) -> int:
        """As FRAMES tells it."""
        hpa = self.vm.memory.hpa(gpa)
        assert hpa is not None
        return hpa

    def slot(self, gpa: int) -> int:
        """The hpa of the entry by which the kernel has this frame."""
        return self.hpa(self.direct + gpa // PAGE * 8)

    def map(self, gpa: int, value: int) -> int:
        """Ask for that entry to be this."""
        return self.change((self.slot(gpa) | Change.ENTRY, value))


def audit(guest: PvGuest) -> None:
    """What is noted of the guest's frames is what its tables say, and they can do no harm."""
    paging, memory, view = guest.paging, guest.vm.host.memory, guest.guest.view
    own = {pfn + n: gfn + n for gfn, pfn, frames in guest.vm.memory.p2m for n in range(frames)}
    roots = [pfn << 12 for pfn in paging.pinned] + [view.root]
    users: Counter[int] = Counter(root >> 12 for root in roots)
    readers: Counter[int] = Counter()
    kinds = {root >> 12: paging.levels for root in roots}
    writable: set[int] = set()
    if guest.guest.shared:
        users[guest.guest.shared >> 12] += 1
        writable.add(guest.guest.shared >> 12)
    left = list(kinds)
    while left:
        pfn = left.pop()
        level = kinds[pfn]
        count = 4 if level == 3 and paging.levels == 3 else 512
        for entry in _present(memory.read(pfn << 12, 8 * count)):
            named = entry >> 12 & (1 << 40) - 1
            assert named in own, f"entry {entry:#x} names a frame that is not the guest's"
            assert level == 1 or not entry & 0x80, "a large page"
            if level > 1:
                users[named] += 1
                assert kinds.get(named, level - 1) == level - 1
                if named not in kinds:
                    kinds[named] = level - 1
                    left.append(named)
            elif entry & WRITABLE:
                users[named] += 1
                writable.add(named)
            else:
                readers[named] += 1
    assert not writable & kinds.keys(), "a page table is mapped writable"
    assert dict(users) == paging.users
    assert dict(readers) == paging.readers
    assert {own[pfn] for pfn in kinds} == paging.traced
    assert all(paging.kinds[pfn] == kinds.get(pfn, DATA) for pfn in users)


def _present(raw: bytes) -> Sequence[int]:
    return [entry for entry in struct.unpack(f"<{len(raw) // 8}Q", raw) if entry & PRESENT]
