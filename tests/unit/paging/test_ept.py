"""EPT against the p2m it stands for: every entry reached by hand."""

import random
from types import SimpleNamespace

import pytest

from tests.unit.fakes import fake_machine
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging import PagingError
from understudy.paging.ept import AD, LARGE, RWX, Ept

MEGA = 512  # frames of a 2-MByte page
GIGA = 512 * 512


@pytest.fixture
def host() -> Host:
    with fake_machine():
        return Host("8G")


def translate(ept: Ept, gfn: int) -> tuple[int, int] | None:
    """(pfn, level of the page) that the tables give."""
    entries = ept.entries(gfn << 12)
    last, level = entries[-1], 5 - len(entries)
    if not last & RWX:
        return None
    assert last & RWX == RWX
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
    invalidated: list[object] = []
    guest = SimpleNamespace(invalidate=lambda: invalidated.append(None))
    ept.attach(guest)  # type: ignore[arg-type]
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
    invalidated: list[object] = []
    guest = SimpleNamespace(invalidate=lambda: invalidated.append(None))
    ept.attach(guest)  # type: ignore[arg-type]
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
    free = host.frames.free_count + len(ept.tables)
    for _ in range(60):
        gfn = chance.choice([0, 1, MEGA, 3 * MEGA - 1, GIGA - 1, GIGA]) + chance.randrange(4)
        count = chance.choice([1, 3, MEGA, 2 * MEGA])
        if chance.random() < 0.35:
            p2m.unmap(gfn, count)
        else:
            p2m.map(gfn, gfn % MEGA + chance.randrange(4) * MEGA, count)
        for probe in [gfn - 1, gfn, gfn + 1, gfn + count - 1, gfn + count, 2 * MEGA]:
            if probe >= 0:
                found = translate(ept, probe)
                assert (found and found[0]) == p2m.lookup(probe)
        assert host.frames.free_count == free - len(ept.tables)
    p2m.unmap(0, 4 * GIGA)
    assert len(ept.tables) == 1


def test_a_violation_is_a_fill_or_a_device(host: Host) -> None:
    p2m = P2m()
    p2m.map(0, 0, 8)
    ept = Ept(host, p2m)
    assert not ept.violation(0x9000, 0)
    with pytest.raises(PagingError, match="stale translation"):
        ept.violation(0x3000, 0)
    host.memory.fill(ept.root, 4096)
    assert ept.violation(0x3000, 0)
    assert translate(ept, 3) == (3, 1)
    assert ept.fills == 1
