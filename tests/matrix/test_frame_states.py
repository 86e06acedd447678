"""Frames that are logged, shared, or wrongly mapped, while a guest uses them.

What: a guest that writes pages and edits its tables under each paging technique and in each format
of tables; all memory is compared, frame by frame.  Source: none.  Invariants: no frame changes
unless the dirty log has it; what a clone sees never changes because of its origin.
"""

import pytest

from tests.matrix import programs as p
from tests.matrix.test_paging_costs import FULL, LEAF, TECHNIQUES, WRITES, Bench
from tests.property.paging_machine import DATA, FORMATS, ROOTS, TABLES
from understudy.arch.address import PAGE
from understudy.arch.exit_reason import Reason
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.dirty_log import DirtyLog
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import P2m
from understudy.machine.words import FRAMES, Flag
from understudy.verdict import StopKind
from understudy.vm import VM

USED = set(DATA[:6])


@pytest.fixture(params=FORMATS)
def shape_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def differ(before: bytes, after: bytes) -> set[int]:
    """The frames that are not what they were."""
    return {at // PAGE for at in range(0, len(before), PAGE)
            if before[at : at + PAGE] != after[at : at + PAGE]}  # fmt: skip


def fill(bench: Bench, value: int) -> None:
    """Write something new to each page."""
    for n in range(WRITES):
        bench.must("store", rdi=(n << 12) + 0x100, eax=value + n)


def work(bench: Bench) -> None:
    """Write to pages, edit a table, change the address space, write again."""
    fill(bench, 0x100)
    for n in range(6):
        at = bench.tables_gva + (TABLES.index(LEAF) << 12) + n * bench.shape.entry_bytes
        bench.must("store", rdi=at, eax=DATA[(n + 1) % 6] << 12 | FULL)
    bench.load_cr3(ROOTS[1])
    fill(bench, 0x200)
    bench.invlpg(0)


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_the_log_holds_what_a_guest_writes(paging: str, shape_name: str) -> None:
    bench = Bench(paging, shape_name)
    memory, p2m = bench.vm.memory, bench.vm.memory.p2m
    log = DirtyLog(p2m)
    log.start()
    for round in range(3):
        before = memory.read(0, memory.size)
        fill(bench, round << 4 | 1)
        written = set(log.take())
        assert differ(before, memory.read(0, memory.size)) <= written
        assert written >= USED
        assert LEAF not in written or paging == "ept"  # whose walks count as writes to tables
    before = memory.read(0, memory.size)
    work(bench)
    memory.write(0x900 << 12, b"device")
    written = set(log.take())
    assert differ(before, memory.read(0, memory.size)) <= written
    assert {*USED, LEAF, 0x900} <= written
    bench.must("load", rdi=0x100)
    assert not USED & set(log.take())
    log.stop()
    assert p2m.protected == 0
    bench.use()
    bench.close()


@pytest.mark.parametrize("is_logged", [False, True], ids=["alone", "logged"])
@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_clone_never_sees_what_its_origin_writes(
    paging: str, shape_name: str, is_logged: bool
) -> None:
    bench = Bench(paging, shape_name)
    memory, host = bench.vm.memory, bench.vm.host
    cow, log, clone = CopyOnWrite(host), DirtyLog(memory.p2m), GuestMemory(host, memory.size)
    bench.vcpu.leave_guest()
    cow.clone(memory.p2m, clone.p2m)
    before, free = clone.read(0, clone.size), host.frames.free_count
    if is_logged:
        log.start()
    work(bench)
    assert clone.read(0, clone.size) == before
    changed = differ(before, memory.read(0, memory.size))
    assert USED | {LEAF} <= changed
    assert free - host.frames.free_count >= len(changed)
    if is_logged:
        assert changed <= set(log.take())
    for gfn in (DATA[0], LEAF):
        assert clone.p2m.lookup(gfn) != memory.p2m.lookup(gfn)
    cow.release(clone.p2m)
    copies = memory.p2m.protected
    for gfn in range(0x900, 0x900 + 8):
        memory.write(gfn << 12, b"mine")
    assert memory.p2m.protected == copies - 8
    bench.load_cr3(ROOTS[0])
    bench.use()
    bench.close()


def test_an_ept_follows_in_large_pages() -> None:
    """A frame that is written costs its block the large page, and no other block."""
    bench = Bench("ept", "Intel 64")
    memory = bench.vm.memory
    cow, ept = CopyOnWrite(bench.vm.host), bench.vm.pages
    bench.vcpu.leave_guest()
    clone = P2m()
    cow.clone(memory.p2m, clone)
    cow.release(clone)
    tables = ept.table_count
    bench.use()
    blocks = {piece[0] // FRAMES for piece in memory.p2m.pieces() if not piece[1] & Flag.SHARED}
    assert len(blocks) < memory.size // PAGE // FRAMES
    assert ept.table_count == tables + len(blocks)
    assert bench.vm.counts()["exits"]["EPT_VIOLATION"] == ept.fills > 0
    bench.close()


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(
    ("entry", "reason", "words"),
    [
        (2, Reason.EPT_MISCONFIGURATION, "W is 1 and R is 0"),
        (0x17, Reason.EPT_MISCONFIGURATION, "MEMTYPE 2 is reserved"),
        (0, Reason.EPT_VIOLATION, "expected 0x"),
    ],
)
def test_a_wrong_entry_on_ram_is_no_device(
    engine: str, entry: int, reason: Reason, words: str
) -> None:
    with VM("16M", engine=engine, largest_page="4K") as vm:
        p.start(vm, p.READ_DATA)
        table = vm.pages.entries(p.DATA)[2] & (1 << 52) - PAGE  # type: ignore[attr-defined]
        slot = table + (p.DATA >> 12 & 511) * 8
        place = vm.host.memory.read_u64(slot) & -PAGE & (1 << 52) - 1
        vm.host.memory.write_u64(slot, place | entry if entry else 0)
        stop = vm.go(wall_seconds=60)
        assert stop.kind == StopKind.ERROR, stop
        assert words in stop.detail
        assert f"at gpa {p.DATA:#x}" in stop.detail
        assert vm.counts()["exits"] == {reason.name: 1}
