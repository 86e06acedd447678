"""The reverse map against a plain dictionary of what each slot maps."""

from hypothesis import given
from hypothesis import strategies as st

from understudy.paging.reverse_map import BLOCK, ReverseMap

SLOTS = st.integers(0, 5).map(lambda n: 0x1000 + 8 * n)
FRAMES = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
ACTIONS = st.lists(st.tuples(st.sampled_from(["small", "large", "remove"]), SLOTS, FRAMES))


@given(ACTIONS, FRAMES, st.integers(1, 2 * BLOCK))
def test_what_is_listed_is_what_is_mapped(
    actions: list[tuple[str, int, int]], gfn: int, count: int
) -> None:
    reverse, small, large = ReverseMap(), dict[int, int](), dict[int, int]()
    for action, slot, frame in actions:
        known = slot in small or slot in large
        assert reverse.remove(slot) == known
        small.pop(slot, None)
        large.pop(slot, None)
        if action == "small":
            reverse.add(slot, frame)
            small[slot] = frame
        elif action == "large":
            reverse.add_large(slot, frame // BLOCK * BLOCK)
            large[slot] = frame // BLOCK
    assert len(reverse) == len(small) + len(large)
    assert set(reverse.small(gfn)) == {slot for slot, frame in small.items() if frame == gfn}
    assert set(reverse.large(gfn)) == {slot for slot, n in large.items() if n == gfn // BLOCK}
    inside = {slot for slot, frame in small.items() if gfn <= frame < gfn + count}
    inside |= {
        slot for slot, n in large.items() if n * BLOCK < gfn + count and (n + 1) * BLOCK > gfn
    }
    assert set(reverse.slots_in(gfn, count)) == inside
    assert all(reverse.frame_at(slot) == frame for slot, frame in small.items())
