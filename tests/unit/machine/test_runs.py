"""Guest memory in several runs at once: what one call reads and writes is what many would."""

import random

import pytest

from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.machine.physical import PhysicalMemory
from understudy.machine.words import Flag

PAGES, PAGE = 16, 4096
SIZE = PAGES * PAGE


@pytest.fixture
def memory() -> GuestMemory:
    """RAM in which no two pages are neighbors on the host."""
    memory = GuestMemory(Host("16M"), SIZE)
    memory.populate()
    frames = [memory.p2m.lookup(gfn) for gfn in range(PAGES)]
    for gfn, pfn in enumerate(reversed(frames)):
        assert pfn is not None
        memory.p2m.map(gfn, pfn, 1)
    memory.write(0, random.Random(1).randbytes(SIZE))
    return memory


def test_runs_are_read_and_written_as_by_many_calls(memory: GuestMemory) -> None:
    chance = random.Random(2)
    for _ in range(300):
        runs = []
        for _ in range(chance.randrange(6)):
            size = chance.choice([0, 1, 512, PAGE, PAGE + 1, 3 * PAGE])
            runs.append((chance.randrange(SIZE - size), size))
        assert memory.gather(runs) == PhysicalMemory.gather(memory, runs)
        data = chance.randbytes(chance.choice([0, 1, 700, 5000, 20_000]))
        before = memory.read(0, SIZE)
        count = PhysicalMemory.scatter(memory, runs, data)
        expected = memory.read(0, SIZE)
        memory.write(0, before)
        assert memory.scatter(runs, data) == count == min(len(data), sum(n for _, n in runs))
        assert memory.read(0, SIZE) == expected


def test_what_is_no_ram_is_refused(memory: GuestMemory) -> None:
    for runs in ([(0, PAGE), (SIZE, 1)], [(0, PAGE), (SIZE - 1, 2)], [(1 << 40, 1)]):
        with pytest.raises(GuestMemoryError):
            memory.scatter(runs, bytes(sum(size for _, size in runs)))
        with pytest.raises(GuestMemoryError):
            memory.gather(runs)
    assert memory.scatter([(0, PAGE), (SIZE, 1)], bytes(PAGE)) == PAGE, "what data does not reach"


def test_in_pieces_or_not_it_is_the_same_memory(memory: GuestMemory) -> None:
    whole = GuestMemory(memory.host, 4 << 20)
    whole.populate()
    whole.scatter([(PAGE, PAGE), (3 * PAGE - 8, 3 * PAGE)], memory.read(0, 4 * PAGE))
    assert whole.p2m.places([(PAGE, 5 * PAGE)]) is not None
    assert memory.p2m.places([(PAGE, 5 * PAGE)]) is None
    assert whole.gather([(PAGE, PAGE), (3 * PAGE - 8, 3 * PAGE)]) == memory.read(0, 4 * PAGE)


def test_who_protects_a_frame_is_asked(memory: GuestMemory) -> None:
    asked = []

    class Owner:
        def write(self, p2m: object, gfn: int) -> None:
            asked.append(gfn)
            memory.p2m.unprotect(gfn)

        def touch(self, p2m: object, gfn: int) -> None:
            raise AssertionError("no frame was taken away")

    memory.p2m.owners[Flag.SEALED] = Owner()
    memory.p2m.protect(3, 1)
    assert memory.scatter([(PAGE, 4), (3 * PAGE, 4)], b"abcdefgh") == 8
    assert asked == [3] and memory.read(3 * PAGE, 4) == b"efgh"


def test_who_traces_a_frame_hears_of_it(memory: GuestMemory) -> None:
    heard = []

    class Tracer:
        traced = frozenset({2})

        def table_written(self, gpa: int, length: int) -> None:
            heard.append((gpa, length))

    memory.p2m.tracers.append(Tracer())
    memory.scatter([(PAGE, 8), (2 * PAGE + 8, 8)], bytes(16))
    assert heard == [(2 * PAGE + 8, 8)]
