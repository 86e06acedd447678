"""Sampling: what is counted, what it costs, and that nothing is lost or leaks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.arch.address import PAGE
from understudy.clock import ManualClock
from understudy.machine.ballooned import Ballooned
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.dirty_log import DirtyLog
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.machine.words import Flag
from understudy.overcommit.working_set import PERIODS_KEPT, WorkingSet

FRAMES = 1000


def made(**options: int) -> tuple[Host, GuestMemory, WorkingSet]:
    host = Host("16M")
    memory = GuestMemory(host, FRAMES * PAGE)
    memory.populate()
    return host, memory, WorkingSet(memory, **options)


def use(memory: GuestMemory, frames: range) -> None:
    for gfn in frames:
        memory.read(gfn * PAGE, 1)


def test_each_page_is_counted_once() -> None:
    _, memory, sampler = made()
    for gfn in range(FRAMES):
        memory.write(gfn * PAGE, gfn.to_bytes(2, "little"))
    sampler.begin()
    assert memory.p2m.absent == 100
    use(memory, range(FRAMES))
    use(memory, range(FRAMES))
    assert memory.p2m.absent == 0
    found = sampler.end()
    assert (found.samples, found.touched, found.pages) == (100, 100, FRAMES)
    assert found.millionths == 1_000_000 and sampler.faults == 100 and sampler.active == FRAMES
    for gfn in range(FRAMES):
        assert memory.read(gfn * PAGE, 2) == gfn.to_bytes(2, "little")


def test_two_runs_are_one_and_seeds_differ() -> None:
    def run(seed: int) -> list[int]:
        _, memory, sampler = made(seed=seed)
        for _ in range(5):
            sampler.begin()
            use(memory, range(300))
            sampler.end()
        return [one.touched for one in sampler.periods]

    assert run(1) == run(1) != run(2)


def test_so_many_periods_are_kept_and_all_count() -> None:
    _, memory, sampler = made(samples=4)
    for _ in range(PERIODS_KEPT):
        sampler.begin()
        use(memory, range(FRAMES))
        sampler.end()
    for _ in range(10):
        sampler.begin()
        last = sampler.end()
    assert len(sampler.periods) == PERIODS_KEPT and sampler.periods[-1] is last
    assert [one.touched for one in sampler.periods] == [4] * (PERIODS_KEPT - 10) + [0] * 10
    assert 0 < sampler.slow < 1_000_000


def test_the_three_averages() -> None:
    _, memory, sampler = made(samples=FRAMES)  # all of them: exact
    for _ in range(20):
        sampler.begin()
        use(memory, range(100))
        sampler.end()
    assert sampler.slow == sampler.fast == sampler.millionths == 100_000
    sampler.begin()
    use(memory, range(500))
    assert (sampler.fast, sampler.current, sampler.millionths) == (100_000, 300_000, 300_000)
    sampler.end()
    assert (sampler.slow, sampler.fast, sampler.active) == (150_000, 300_000, 300)
    for _ in range(2):
        sampler.begin()
        sampler.end()
    assert sampler.fast == 75_000 and sampler.slow == 114_843 == sampler.millionths
    assert sampler.active == 115


def test_what_protects_a_page_does_so_afterwards() -> None:
    host, memory, sampler = made(samples=FRAMES)
    log, clone = DirtyLog(memory.p2m), GuestMemory(host, FRAMES * PAGE)
    log.start()
    CopyOnWrite(host).clone(memory.p2m, clone.p2m)
    words = [memory.p2m.word(gfn) for gfn in range(FRAMES)]
    sampler.begin()
    use(memory, range(500))
    sampler.end()
    assert [memory.p2m.word(gfn) for gfn in range(FRAMES)] == words
    sampler.begin()
    memory.write(3 * PAGE, b"mine")
    assert clone.read(3 * PAGE, 4) == bytes(4) and log.take() == [3]
    log.stop()
    sampler.end()
    memory.write(4 * PAGE, b"nobody logs that")


def test_frames_that_are_gone_meanwhile_are_nobodys() -> None:
    host, memory, sampler = made(samples=FRAMES)
    pages, free = Ballooned(memory), host.frames.free_count
    sampler.begin()
    memory.p2m.unmap(7, 1)
    assert host.frames.free_count == free + 1
    use(memory, range(10, 15))
    assert pages.inflate([(10, 10)]) == 10 and host.frames.free_count == free + 11
    memory.close()
    sampler.close()
    assert host.frames.free_count == host.memory.size // PAGE - 1


def test_a_reset_of_memory_leaks_nothing() -> None:
    host, memory, sampler = made()
    free = host.frames.free_count
    sampler.begin()
    memory.clear()
    assert host.frames.free_count == free and memory.p2m.absent == 0
    assert sampler.end().touched == 0


def test_pages_that_are_not_there_are_not_sampled() -> None:
    _, memory, sampler = made(samples=FRAMES)
    Ballooned(memory).inflate([(0, 400)])
    sampler.begin()
    assert sampler.end().pages == FRAMES - 400
    assert memory.p2m.absent == 400


def test_periods_by_a_clock() -> None:
    _, memory, sampler = made()
    clock = ManualClock()
    sampler.every(clock, 1000)
    clock.advance(3500)
    assert len(sampler.periods) == 3
    sampler.every(clock, 100)
    clock.advance(250)
    assert len(sampler.periods) == 5
    sampler.close()
    clock.advance(5000)
    assert len(sampler.periods) == 5 and memory.p2m.absent == 0
    assert Flag.SAMPLED not in memory.p2m.owners


def test_what_is_refused() -> None:
    _, memory, sampler = made()
    with pytest.raises(ValueError, match="sampled already"):
        WorkingSet(memory)
    with pytest.raises(ValueError, match="samples"):
        WorkingSet(memory, samples=0)
    with pytest.raises(ValueError, match="period"):
        sampler.every(ManualClock(), 0)
    with pytest.raises(GuestMemoryError):
        sampler.write(memory.p2m, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "end", "write", "inflate", "report", "deflate", "clear"]),
            st.integers(0, FRAMES - 1), st.integers(1, 60),
        ),
        max_size=30,
    )
)  # fmt: skip
def test_no_byte_and_no_frame_is_lost(steps: list[tuple[str, int, int]]) -> None:
    host, memory, sampler = made(samples=400)
    pages, free, inside = Ballooned(memory), host.frames.free_count, [0] * FRAMES
    for n, (kind, gfn, count) in enumerate(steps):
        touched = range(gfn, min(gfn + count, FRAMES))
        if kind == "write":
            for f in touched:
                memory.write(f * PAGE, bytes([n + 1]))
                inside[f] = n + 1
        elif kind in ("inflate", "report"):
            getattr(pages, kind)([(gfn, count)])
            for f in touched:
                inside[f] = 0 if memory.p2m.word(f) & (Flag.BALLOONED | Flag.FREE) else inside[f]
        elif kind == "deflate":
            pages.deflate([(gfn, count)])
        elif kind == "clear":
            memory.clear()
            inside = [0] * FRAMES
        else:
            getattr(sampler, kind)()
        assert host.frames.free_count == free + pages.ballooned + pages.free
    assert [memory.read(f * PAGE, 1)[0] for f in range(FRAMES)] == inside
