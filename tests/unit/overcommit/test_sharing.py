"""Sharing by contents: what becomes one frame, what does not, and what each finds afterwards.

Source: none.  Counts are asserted.  Each fault that is planted here is found by the same audit that
the sound one passes.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from tests.matrix import programs as p
from tests.matrix.test_paging_costs import TECHNIQUES
from understudy.arch.address import PAGE
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import Runs
from understudy.overcommit import sharing as sharing_module
from understudy.overcommit.merging import Match, Merger
from understudy.overcommit.sharing import Hash, Sharing, use
from understudy.verdict import StopKind
from understudy.vm import VM

FRAMES = 16
A, B = b"a" * PAGE, b"b" * PAGE


def guest(host: Host) -> GuestMemory:
    made = GuestMemory(host, FRAMES * PAGE)
    made.spare.close()
    made.populate()
    return made


def numbered(memory: GuestMemory) -> None:
    """No two frames of the same contents."""
    for gfn in range(FRAMES):
        memory.write(gfn * PAGE, id(memory).to_bytes(8, "little") + bytes([gfn + 1]))


def scanned_once(host: Host) -> tuple[GuestMemory, GuestMemory, Sharing]:
    """Two guests of which one was looked at, when its first frame alone was A."""
    one, two = guest(host), guest(host)
    numbered(one)
    numbered(two)
    one.write(0, A)
    sharing = Sharing(host)
    sharing.join(one.p2m)
    sharing.join(two.p2m)
    sharing.scan(FRAMES)
    return one, two, sharing


def test_a_guest_that_writes_ever_new_contents_fills_no_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing_module, "FEWEST", 20)
    host = Host("1M")
    one, most = guest(host), 0
    sharing = Sharing(host)
    sharing.join(one.p2m)
    for turn in range(50):
        for gfn in range(FRAMES):
            one.write(gfn * PAGE, (turn * FRAMES + gfn + 1).to_bytes(8, "little"))
        sharing.scan(FRAMES)
        most = max(most, len(sharing._found))
    assert FRAMES < most <= 2 * FRAMES
    one.write(0, A)
    one.write(PAGE, A)
    assert sharing.scan(FRAMES) == 1


def test_equal_frames_become_one_and_a_writer_gets_a_copy() -> None:
    host = Host("1M")
    one, two = guest(host), guest(host)
    numbered(one)
    numbered(two)
    one.write(3 * PAGE, A)
    two.write(5 * PAGE, A)
    free, sharing = host.frames.free_count, Sharing(host)
    sharing.join(one.p2m)
    sharing.join(two.p2m)
    assert sharing.scan(1000) == 1
    assert sharing.scanned == 2 * FRAMES
    assert sharing.hints == 2 * FRAMES - 2
    assert one.hpa(3 * PAGE) == two.hpa(5 * PAGE)
    assert host.frames.free_count == free + 1
    assert use(host, [one.p2m, two.p2m]) == (30, 2, 0, 0, 31, 1)
    two.write(5 * PAGE, b"!")
    assert (one.read(3 * PAGE, 2), two.read(5 * PAGE, 2)) == (b"aa", b"!a")
    assert host.frames.free_count == free
    assert use(host, [one.p2m, two.p2m]) == (32, 0, 0, 0, 32, 0)


def test_zero_frames_are_one_hole() -> None:
    host = Host("1M")
    one, sharing = guest(host), Sharing(host)
    sharing.join(one.p2m)
    assert sharing.scan(FRAMES) == FRAMES - 1
    assert use(host, [one.p2m]) == (0, FRAMES, 0, FRAMES, 1, FRAMES - 1)
    assert host.memory.resident_bytes() == 0


def test_a_hint_that_changed_costs_nothing() -> None:
    host = Host("1M")
    one, two, sharing = scanned_once(host)
    assert one.p2m.protected == 0
    one.write(0, B)
    two.write(0, A)
    assert sharing.scan(FRAMES) == 0
    assert sharing.refused == 1
    assert one.p2m.protected == two.p2m.protected == 0


def test_the_last_one_is_protected_no_longer_than_until_the_next_scan() -> None:
    """A large page was split only to share."""
    with Host("64M") as host, VM("16M", host=host) as one, VM("16M", host=host) as two:
        tables, word = one.pages.table_count, one.memory.p2m.uniform(2048, 2)
        one.memory.write(2048 * PAGE, A)  # nothing else in that block is like anything else
        for gfn in range(2049, 2560):
            one.memory.write(gfn * PAGE, gfn.to_bytes(2, "little"))
        sharing = Sharing(host)
        sharing.join(one.memory.p2m)
        sharing.scan(1 << 12)
        before = one.pages.table_count
        assert one.memory.p2m.uniform(2048, 2) == word
        two.memory.write(2048 * PAGE, A)
        sharing.join(two.memory.p2m)
        sharing.scan(1 << 13)
        assert one.memory.hpa(2048 * PAGE) == two.memory.hpa(2048 * PAGE)
        assert one.memory.p2m.uniform(2048, 2) is None
        assert one.pages.table_count == before + 1
        two.memory.write(2048 * PAGE, B)
        sharing.scan(1 << 13)
        assert one.memory.p2m.uniform(2048, 2) == word
        assert one.pages.table_count == before >= tables


def test_a_frame_that_is_as_it_was_costs_hardly_a_call() -> None:
    """Of functions of Python's; and a frame that others have is read once a round."""
    host, frames = Host("32M"), 2048
    guests = [GuestMemory(host, frames * PAGE) for _ in range(2)]
    sharing = Sharing(host)
    for number, one in enumerate(guests):
        one.populate()
        for gfn in range(frames // 2):
            one.write(gfn * PAGE, (number << 20 | gfn + 1).to_bytes(8, "little"))
        sharing.join(one.p2m)
    assert sharing.scan(2 * frames) == frames - 1
    events = Counter[str]()

    def count(frame: FrameType, event: str, what: object) -> None:
        events[event] += 1

    found = []
    for _ in range(2):  # its own, and those of zeros that others have
        events.clear()
        scanned = sharing.scanned
        sys.setprofile(count)
        try:
            assert sharing.scan(frames // 2) == 0
        finally:
            sys.setprofile(None)
        found.append((sharing.scanned - scanned, events["call"]))
    (own, own_calls), (zero, zero_calls) = found
    assert (own, zero) == (frames // 2, 1)
    assert own_calls <= own // 8 and zero_calls <= 4 * frames // 2, found
    host.close()


def test_frames_that_become_another_s_cost_little() -> None:
    """What tables, processors and the computer hear of them; they go as runs."""
    frames, heard, gone = 256, Counter[int](), list[int]()
    host = Host("16M")
    before = host.frames._discard

    def hear(number: int, runs: Runs) -> None:
        heard[number] += 1

    def discard(pfn: int, count: int) -> None:
        gone.append(count)
        before(pfn, count)

    guests = [GuestMemory(host, frames * PAGE) for _ in range(2)]
    sharing = Sharing(host)
    for number, one in enumerate(guests):
        one.populate()
        for gfn in range(frames):
            one.write(gfn * PAGE, (gfn + 1).to_bytes(8, "little"))
        one.p2m.watchers.append(partial(hear, number))
        sharing.join(one.p2m)
    host.frames._discard = discard
    assert sharing.scan(2 * frames) == frames
    assert heard[0] == 1  # its frames are protected
    assert heard[1] == 2  # and those of the other one become others then
    assert gone == [frames]
    assert use(host, [one.p2m for one in guests]) == (0, 2 * frames, 0, 0, frames, frames)
    host.close()


def test_a_hash_of_what_has_changed_keeps_nobody_from_sharing() -> None:
    """Three of a batch are alike, and what had their hash before is not any more."""
    host = Host("1M")
    one, two, sharing = scanned_once(host)
    one.write(0, B)
    for gfn in (1, 2, 5):
        two.write(gfn * PAGE, A)
    assert sharing.scan(FRAMES) == 2
    assert sharing.refused == 3
    assert len({two.hpa(gfn * PAGE) for gfn in (1, 2, 5)}) == 1
    assert one.p2m.protected == 0


def test_groups_never_share() -> None:
    host = Host("1M")
    one, two = guest(host), guest(host)
    sharing = Sharing(host)
    sharing.join(one.p2m, "red")
    sharing.join(two.p2m, "blue")
    sharing.scan(1000)
    assert one.hpa(0) != two.hpa(0)
    assert use(host, [one.p2m, two.p2m]).consumed == 2


def test_who_leaves_is_not_found_any_more() -> None:
    host = Host("1M")
    one, two = guest(host), guest(host)
    sharing = Sharing(host)
    sharing.join(one.p2m)
    sharing.join(two.p2m)
    with pytest.raises(ValueError, match="already"):
        sharing.join(two.p2m)
    sharing.scan(FRAMES)
    sharing.leave(one.p2m)
    assert sharing.hints == 0
    sharing.scan(1000)
    assert one.hpa(0) != two.hpa(0)


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_guest_that_writes_exits_once(paging: str) -> None:
    """Against the same guest whose frame is its own, to see what the write alone has cost."""
    exits, copies = [], []
    for is_shared in (False, True):
        with (
            Host("64M") as host,
            VM("2M", host=host, paging=paging) as one,
            VM("2M", host=host, paging=paging) as two,
        ):
            for vm in (one, two):
                p.start(vm, WRITES, rdi=p.DATA)
                vm.memory.write(p.DATA, A)
                assert vm.go(budget=2).kind == StopKind.BUDGET  # it has written, and may again
                vm.vcpus[0].leave_guest()
            if is_shared:
                sharing = Sharing(host)
                sharing.join(one.memory.p2m)
                sharing.join(two.memory.p2m)
                sharing.scan(1 << 20)
                assert one.memory.hpa(p.DATA) == two.memory.hpa(p.DATA)
            one.go(budget=1)  # it finds its code and the page where they are now
            before, free = dict(one.counts()["exits"]), host.frames.free_count
            one.go(budget=1)
            after = one.counts()["exits"]
            exits.append(sum(after.values()) - sum(before.values()))
            copies.append(free - host.frames.free_count)
            assert two.memory.read(p.DATA, 2) == b"\x01a"
            assert one.memory.read(p.DATA, 3) == b"\x01\x02a"
    assert copies == [0, 1]
    assert exits == [0, 1]


WRITES = """
    c607 01             | mov byte [rdi], 1
    8a07                | mov al, [rdi]
    8a07                | mov al, [rdi]
    c64701 02           | mov byte [rdi+1], 2
    ebfe                | jmp $
"""

# --- any order of writes, scans and copies; and what is found if something is forgotten ---

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, 15), st.sampled_from("ab0")),
        st.tuples(st.just("scan"), st.integers(1, 40), st.just(0), st.just("")),
    ),
    max_size=60,
)


def play(steps: list[tuple[str, int, int, str]], make: Callable[[Host], Sharing]) -> None:
    """Two guests; an oracle of bytes, and an audit of who owns which frame."""
    host = Host("1M")
    guests, sharing = [guest(host), guest(host)], make(host)
    frames = host.frames.free_count + 2 * FRAMES
    contents = [[bytes(PAGE)] * FRAMES for _ in guests]
    for one in guests:
        sharing.join(one.p2m)
    for what, n, gfn, value in steps:
        if what == "scan":
            sharing.scan(n)
        else:
            data = contents[n][gfn] = value.replace("0", "\0").encode() * PAGE
            guests[n].write(gfn * PAGE, data)
    owners: dict[int, int] = {}
    for one, expected in zip(guests, contents, strict=True):
        assert [one.read(gfn * PAGE, PAGE) for gfn in range(FRAMES)] == expected
        for gfn in range(FRAMES):
            pfn = one.p2m.lookup(gfn)
            assert pfn is not None
            owners[pfn] = owners.get(pfn, 0) + 1
    assert all(host.frames.references(pfn) == count for pfn, count in owners.items())
    told = use(host, [one.p2m for one in guests])
    assert told.consumed == len(owners)
    assert told.consumed + told.saved == told.own + told.shared == 2 * FRAMES
    assert host.frames.free_count + told.consumed == frames


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_no_byte_and_no_frame_is_lost(steps: list[tuple[str, int, int, str]]) -> None:
    play(steps, Sharing)


@settings(max_examples=50, deadline=None)
@given(STEPS)
def test_nor_with_a_hash_that_is_always_the_same(steps: list[tuple[str, int, int, str]]) -> None:
    play(steps, lambda host: Sharing(host, lambda data, salt: 0))


class Unprotected(Merger):
    """Forgets to protect."""

    def _try(self, matches: list[Match]) -> list[Match]:
        refused = super()._try(matches)
        for match in matches:
            for row in match.rows:
                row.p2m.unprotect(row.gfn, row.frames)
        return refused


class Trusting(Merger):
    """Takes an equal hash for equality."""

    def _are_equal(self, pairs: list[tuple[int, int]]) -> list[int]:
        return [1] * len(pairs)


class Leaking(Merger):
    """Counts an owner too many."""

    def _try(self, matches: list[Match]) -> list[Match]:
        refused = super()._try(matches)
        self._frames.share_all([(match.other.pfn, 1) for match in matches])
        return refused


def faulty(host: Host, broken: type[Merger], hash: Hash) -> Sharing:
    sharing = Sharing(host, hash)
    sharing._merger = broken(host)
    return sharing


ALL_STEPS = [("write", 0, 0, "a"), ("scan", 40, 0, ""), ("write", 0, 2, "b"), ("write", 1, 3, "b")]


@pytest.mark.parametrize("broken", [Unprotected, Trusting, Leaking])
def test_a_planted_fault_is_found(broken: type[Merger]) -> None:
    hash = (lambda data, salt: 0) if broken is Trusting else xxh3_64_intdigest
    with pytest.raises(AssertionError):
        play(ALL_STEPS, lambda host: faulty(host, broken, hash))
    play(ALL_STEPS, Sharing)
