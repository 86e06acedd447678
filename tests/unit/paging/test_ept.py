"""EPT against the p2m it stands for: every entry reached by hand."""

import random
from types import SimpleNamespace

import pytest

from tests.unit.fakes import fake_machine
from understudy.arch.paging_formats import LARGE
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import Flag
from understudy.paging import PagingError
from understudy.paging.ept import READABLE, WRITE, Ept
from understudy.paging.ept_entry import AD, RWX, RX

MEGA = 512  # frames of a 2-MByte page
GIGA = 512 * 512


@pytest.fixture
def host() -> Host:
    with fake_machine():
        return Host("8G")


def attached(ept: Ept) -> list[object]:
    """What the technique has made its processor forget."""
    invalidated: list[object] = []
    ept.attach(SimpleNamespace(invalidate=lambda: invalidated.append(None)))  # type: ignore[arg-type]
    return invalidated


def translate(ept: Ept, gfn: int, rights: int = RWX) -> tuple[int, int] | None:
    """(pfn, level of the page) that the tables give."""
    entries = ept.entries(gfn << 12)
    last, level = entries[-1], 5 - len(entries)
    if not last & RWX:
        return None
    assert last & RWX == rights
    assert last >> 3 & 7 == 6
    assert bool(last & LARGE) == (level > 1)
    return (last >> 12 & (1 << 40) - 1) + gfn % (1 << 9 * (level - 1)), level


def test_pages_are_as_large_as_alignment_allows(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, GIGA, GIGA)
    p2m.map(GIGA, GIGA * 2 + 1, MEGA)  # one frame off
    p2m.map(GIGA + MEGA, MEGA, MEGA)
    ept = Ept(host, p2m)
    assert translate(ept, 12345) == (GIGA + 12345, 3)
    assert translate(ept, GIGA + 5) == (GIGA * 2 + 6, 1)
    assert translate(ept, GIGA + MEGA + 5) == (MEGA + 5, 2)
    assert translate(ept, GIGA + 2 * MEGA) is None
    assert len(ept.tables) == 4


@pytest.mark.parametrize(("largest", "level"), [("4K", 1), ("2M", 2), ("1G", 3)])
def test_the_largest_page_is_a_choice(host: Host, largest: str, level: int) -> None:
    p2m = P2m()
    p2m.map(0, 0, GIGA)
    ept = Ept(host, p2m, largest=largest)
    assert translate(ept, GIGA - 1) == (GIGA - 1, level)


def test_another_page_size_is_refused(host: Host) -> None:
    with pytest.raises(ValueError, match="4K, 2M or 1G"):
        Ept(host, P2m(), largest="8K")


def test_a_change_splits_a_page_and_healing_merges_it(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, GIGA, GIGA)
    ept = Ept(host, p2m)
    invalidated = attached(ept)
    root = ept.root
    slot = ept.entries(0)[0] & ~0xFFF & (1 << 52) - 1
    host.memory.write_u64(slot, host.memory.read_u64(slot) | AD)  # the guest has written to it
    p2m.map(700, 3, 1)
    assert translate(ept, 700) == (3, 1)
    assert translate(ept, 701) == (GIGA + 701, 1)
    assert translate(ept, 5) == (GIGA + 5, 2)
    assert ept.entries(5 << 12)[-1] & AD == AD
    assert len(invalidated) == 1
    p2m.map(700, GIGA + 700, 1)
    assert translate(ept, 700) == (GIGA + 700, 3)
    assert ept.entries(0)[-1] & AD == AD
    assert len(ept.tables) == 2
    assert ept.root == root


def test_what_was_absent_needs_no_invalidation(host: Host) -> None:
    p2m = P2m()
    ept = Ept(host, p2m)
    invalidated = attached(ept)
    p2m.map(5, 5, 3)
    assert invalidated == []
    p2m.unmap(6, 1)
    assert len(invalidated) == 1
    p2m.unmap(5, 1)
    assert len(invalidated) == 2


def test_tables_follow_any_history_of_the_p2m(host: Host) -> None:
    chance = random.Random(1)
    p2m = P2m()
    ept = Ept(host, p2m)
    invalidated = attached(ept)
    for _ in range(150):
        gfn = chance.choice([0, 1, MEGA, 3 * MEGA - 1, GIGA - 1, GIGA]) + chance.randrange(4)
        count = chance.choice([1, 3, 20, MEGA, 2 * MEGA])
        probes = [gfn - 1, gfn, gfn + 1, gfn + count - 1, gfn + count, 2 * MEGA]
        probes = [probe for probe in probes if probe >= 0]
        before = {probe: p2m.word(probe) for probe in probes}
        invalidated.clear()
        what = chance.random()
        if what < 0.3:
            p2m.unmap(gfn, count)
        elif what < 0.5:
            p2m.protect(gfn, count)
        elif what < 0.6:
            p2m.unprotect(gfn, count)
        elif what < 0.7:
            with p2m.batch():
                p2m.protect_all(Flag.LOGGED)
                p2m.take(gfn, count)
        elif what < 0.75:
            p2m.unprotect_all(Flag.LOGGED | Flag.SEALED)
        else:
            p2m.map(gfn, gfn % MEGA + chance.randrange(4) * MEGA, count)
        for probe in probes:
            found = translate(ept, probe, RX if p2m.is_protected(probe) else RWX)
            assert (found and found[0]) == p2m.lookup(probe)
            lost = before[probe] & ~0xFFF != p2m.word(probe) & ~0xFFF or (
                not before[probe] & 0xFC0 and p2m.is_protected(probe)
            )
            assert invalidated or not (before[probe] & 1 and lost)
        assert ept.reserve.in_use == len(ept.tables)
        again = Ept(host, p2m)
        assert dump(again) == dump(ept)
        again.close()
    p2m.unmap(0, 4 * GIGA)
    assert len(ept.tables) == 1


def dump(ept: Ept) -> list[tuple[int, ...]]:
    """All that the tables say, wherever they lie."""

    def below(table: int, level: int, base: int) -> list[tuple[int, ...]]:
        out = []
        words = memoryview(ept.memory.read(table, 4096)).cast("Q")
        for n, entry in enumerate(words):
            gfn = base + (n << 9 * (level - 1))
            if entry & RWX and level > 1 and not entry & LARGE:
                out += below(entry & (1 << 52) - 4096, level - 1, gfn)
            elif entry:
                out.append((level, gfn, entry & ~AD))
        return out

    return below(ept.root, 4, 0)


def test_protected_memory_is_mapped_by_large_read_only_pages(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, GIGA, GIGA)
    p2m.map(GIGA, 4 * MEGA, 4 * MEGA)
    ept = Ept(host, p2m)
    invalidated, tables = attached(ept), len(ept.tables)
    p2m.protect_all(Flag.SHARED)
    assert len(invalidated) == 1
    assert translate(ept, 5, RX) == (GIGA + 5, 3)
    assert translate(ept, GIGA + 5, RX) == (4 * MEGA + 5, 2)
    assert len(ept.tables) == tables
    p2m.unprotect(MEGA + 7)
    assert translate(ept, MEGA + 7, RWX) == (GIGA + MEGA + 7, 1)
    assert translate(ept, MEGA + 8, RX) == (GIGA + MEGA + 8, 1)
    assert translate(ept, 5, RX) == (GIGA + 5, 2)
    p2m.protect(MEGA + 7, 1, Flag.SHARED)
    assert translate(ept, MEGA + 7, RX) == (GIGA + MEGA + 7, 3)
    p2m.unprotect_all(Flag.SHARED)
    assert translate(ept, 5, RWX) == (GIGA + 5, 3)
    assert len(ept.tables) == tables


def test_accessed_and_dirty_flags_survive(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, MEGA, MEGA)
    ept = Ept(host, p2m)
    slot = ept.entries(0)[1] & (1 << 52) - 4096
    host.memory.write_u64(slot, host.memory.read_u64(slot) | AD)
    p2m.protect(7)  # splits
    for gfn in (7, 8):
        assert ept.entries(gfn << 12)[-1] & AD == AD
    leaf = ept.entries(0)[2] & (1 << 52) - 4096
    host.memory.write_u64(leaf + 8 * 9, host.memory.read_u64(leaf + 8 * 9) & ~AD)
    p2m.unprotect(7)  # merges
    assert ept.entries(0)[-1] & AD == AD
    p2m.protect(7)
    p2m.protect(100, 100)  # in bulk
    p2m.map(300, 5, 20)
    assert [bool(ept.entries(gfn << 12)[-1] & AD) for gfn in (7, 8, 100, 300)] == [
        True, True, True, False,
    ]  # fmt: skip


def test_more_rights_need_no_invalidation(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, 1, 8)
    p2m.protect(0, 8)
    ept = Ept(host, p2m)
    invalidated = attached(ept)
    p2m.unprotect(3)
    p2m.unprotect(0, 8)
    assert invalidated == []
    p2m.protect(3)
    assert len(invalidated) == 1


def test_many_frames_that_move_are_one_invalidation(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, 0, MEGA - 1)
    ept = Ept(host, p2m)
    invalidated = attached(ept)
    p2m.map(100, 2 * MEGA, 100)
    assert len(invalidated) == 1
    assert translate(ept, 150) == (2 * MEGA + 50, 1)


class Refuses:
    def write(self, p2m: P2m, gfn: int) -> None:
        pass

    def touch(self, p2m: P2m, gfn: int) -> None:
        p2m.map(gfn, 6, 1)


def test_a_violation_is_a_fill_or_a_device_or_a_defect(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, 0, 8)
    ept = Ept(host, p2m)
    assert not ept.violation(0x9000, 1)
    with pytest.raises(PagingError, match="stale translation"):
        ept.violation(0x3000, 1)
    p2m.take(4, 1)
    p2m.owners[Flag.SWAPPED] = Refuses()
    assert ept.violation(0x4000, 1)
    assert translate(ept, 4) == (6, 1)
    assert ept.violation(0x4000, WRITE | READABLE)  # another processor has been here
    assert ept.fills == 2
    p2m.protect(4)
    p2m.owners[Flag.SEALED] = Refuses()
    with pytest.raises(PagingError, match="owner does not allow"):
        ept.violation(0x4000, WRITE | READABLE)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (2, "W is 1 and R is 0"),
        (0x3017, "MEMTYPE 2 is reserved"),
        (1 << 46 | 0x3037, "address bits above MAXPHYADDR are reserved"),
        (0, "expected 0x3037"),
    ],
)
def test_an_entry_that_is_wrong_is_decoded(host: Host, entry: int, words: str) -> None:
    p2m = P2m()
    p2m.map(0, 0, 8)
    ept = Ept(host, p2m)
    leaf = ept.entries(0x3000)[2] & (1 << 52) - 4096
    host.memory.write_u64(leaf + 8 * 3, entry)
    with pytest.raises(PagingError, match=r"expected 0x3037.*R=1 W=1 X=1 MEMTYPE=6") as caught:
        ept.violation(0x3000, 1)
    assert words in str(caught.value)
    assert words in str(ept.misconfiguration(0x3000))
    assert "level 1" in str(caught.value)


def test_a_table_that_is_missing_or_too_much_is_named(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, 0, 8)
    ept = Ept(host, p2m)
    level2 = ept.entries(0)[1] & (1 << 52) - 4096
    host.memory.write_u64(level2, 0)
    with pytest.raises(PagingError, match=r"level 2: .* expected a table"):
        ept.violation(0x3000, 1)
    host.memory.write_u64(level2 + 8, 0xB7)
    with pytest.raises(PagingError, match=r"level 2: .* expected 0x0"):
        ept.violation(0x200000, WRITE | 7 << 3)
