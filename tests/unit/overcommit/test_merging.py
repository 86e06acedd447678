"""Frames become one by rows: what belongs together is found out however the rows lie.

What: memory of zeros, of what another guest has in the same place, elsewhere or nowhere, in rows of
any length, some frames of which a device has, too; some are written to between two scans.
Source: none.  Each frame's contents and owners are compared with a plain list.
"""

import random
from collections import Counter

import pytest

from understudy.arch.address import PAGE
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.words import Flag
from understudy.overcommit.sharing import Sharing

FRAMES = 1300  # two blocks and a half
GUESTS = 3
LENGTHS = (1, 1, 2, 3, 7, 8, 40, 300, 600)


def contents(chance: random.Random) -> list[int]:
    """A number for what is in each frame: 0 for zeros."""
    found: list[int] = []
    while len(found) < FRAMES:
        count, at = chance.choice(LENGTHS), len(found)
        kind = chance.choice(("zeros", "one", "here", "elsewhere", "own"))
        first = {"zeros": 0, "one": 7, "here": 10_000 + at, "elsewhere": 10_500}.get(
            kind, chance.getrandbits(40) | 1 << 40
        )
        step = kind not in ("zeros", "one")
        found += [first + n * step for n in range(count)]
    return found[:FRAMES]


def put(memory: GuestMemory, gfn: int, number: int) -> None:
    memory.write(gfn * PAGE, number.to_bytes(8, "little") * (PAGE // 8))


@pytest.mark.parametrize("seed", range(12))
def test_all_that_is_alike_and_nothing_else(seed: int) -> None:
    chance = random.Random(seed)
    with Host((GUESTS * (FRAMES + 64) + 64) * PAGE) as host:
        sharing, guests, expected = Sharing(host), list[GuestMemory](), list[list[int]]()
        for _ in range(GUESTS):
            memory = GuestMemory(host, FRAMES * PAGE)
            memory.populate()
            expected.append(contents(chance))
            for gfn, number in enumerate(expected[-1]):
                put(memory, gfn, number)
            sharing.join(memory.p2m)
            guests.append(memory)
        pinned = {
            pfn for memory in guests for gfn in chance.sample(range(FRAMES), 12)
            if (pfn := memory.p2m.lookup(gfn)) is not None
        }  # fmt: skip
        for pfn in pinned:
            host.frames.share(pfn, 1)
        for number in range(4):
            sharing.scan(GUESTS * FRAMES)
            check(host, guests, expected, pinned, is_done=number == 3)
            for memory, mine in zip(guests, expected, strict=True):
                for gfn in chance.sample(range(FRAMES), 30) if number < 2 else ():
                    if memory.p2m.lookup(gfn) not in pinned:
                        mine[gfn] = chance.choice((0, 7, 10_000 + gfn, 99))
                        put(memory, gfn, mine[gfn])
        for memory in guests:
            sharing.leave(memory.p2m)
            memory.close()
        for pfn in pinned:
            host.frames.free(pfn, 1)
        assert host.frames.free_count == host.frames.count


def check(
    host: Host, guests: list[GuestMemory], expected: list[list[int]], pinned: set[int],
    *, is_done: bool,
) -> None:  # fmt: skip
    """Contents, protection and owners."""
    owners: Counter[int] = Counter(pinned)
    by_number: dict[int, set[int]] = {}
    for memory, mine in zip(guests, expected, strict=True):
        for gfn, number in enumerate(mine):
            pfn = memory.p2m.lookup(gfn)
            assert pfn is not None
            assert host.contents(pfn) == number.to_bytes(8, "little") * (PAGE // 8), gfn
            assert memory.read(gfn * PAGE, 8) == number.to_bytes(8, "little")
            owners[pfn] += 1
            if pfn not in pinned:
                by_number.setdefault(number, set()).add(pfn)
            elif owners[pfn] == 2:
                assert not memory.p2m.word(gfn) & Flag.SHARED
    for memory in guests:
        for gfn in range(FRAMES):
            pfn = memory.p2m.lookup(gfn)
            assert pfn is not None
            assert host.frames.references(pfn) == owners[pfn]
            assert owners[pfn] == 1 or pfn in pinned or memory.p2m.is_protected(gfn)
    if is_done:
        assert all(len(frames) == 1 for frames in by_number.values())
