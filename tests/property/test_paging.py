"""Every way to virtualise memory against one oracle, in every paging format.

What: a Hypothesis state machine: the guest edits its tables, flushes, loads CR3, touches; the
hypervisor moves, removes and write-protects frames.  Source: the invariants of
`understudy.paging`.  What is checked: see `paging_machine`.
"""

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from tests.property.paging_machine import DATA, EDITS, FORMATS, ROOTS, TABLES, Machine
from tests.property.paging_oracle import (
    IA32,
    INTEL64,
    KEY_SHIFT,
    NX,
    PAE,
    PS,
    RW,
    US,
    A,
    Access,
    D,
    G,
    Mode,
    P,
    Shape,
)
from tests.property.playing import play
from understudy.paging import Paging

LARGE_GFNS = {
    "IA-32": (0, 0x400, 0x800),  # 4 MBytes: the second half begins with a table
    "PAE": (0, 0x200, 0x400, 0x600, 0x800),
    "Intel 64": (0, 0x200, 0x400, 0x600, 0x800),
}
FRAMES = (*TABLES, *DATA)
UPPER, MIDDLE, LOWER, SPARE = TABLES[2:5], TABLES[5:7], TABLES[7:10], TABLES[10:]
"""Tables by what they mostly are: any table may come to be used at any level."""
WRITE_BESIDE = 0x1000
LEAST = 6
ROOMS = (0, 0, 0, LEAST, 9, 12, 16)
"""The budget, in tables (0: the usual one).  All that the machines need are about 20."""
LENGTH = 100  # steps of one machine


def indices(shape_name: str) -> list[int]:
    """The entries that are edited; for IA-32, in each part that has a shadow of its own."""
    return [0, 1, 257, 512, 513] if shape_name == "IA-32" else [0, 1]


USES: Final = [
    Access(0, write, fetch, user, ac) for user in (False, True) for write, fetch, ac in (
        (False, False, True), (True, False, True), (False, False, True), (True, False, True),
        (False, False, False), (True, False, False), (False, True, False),
    )
]  # fmt: skip


def addresses(shape_name: str) -> list[int]:
    """The pages that are touched."""
    if shape_name == "IA-32":
        return [i << 22 | j << 12 for i in (0, 1, 257) for j in (0, 1, 512, 513)]
    shifts = FORMATS[shape_name].shifts
    return [
        sum((bits >> n & 1) << shift for n, shift in enumerate(shifts))
        for bits in range(1 << len(shifts))
    ]


def levels(shape: Shape) -> list[tuple[int, ...]]:
    """The tables of each level, from the root down, as the guest begins."""
    return [ROOTS, *[UPPER, MIDDLE, LOWER][4 - len(shape.shifts) :]]


def entries(shape_name: str, paging: str, below: tuple[int, ...]) -> st.SearchStrategy[int]:
    """Entries for a table over the tables `below`; for one of the last level if there are none."""
    shape = FORMATS[shape_name]
    # Rights that let something through are likelier, or nothing would ever be reached.
    full = RW | US
    flags = st.sampled_from([full, full | A, full | A | D, full | A | D, US | A, RW | A | D, US, 0])
    wide = [0] * 12 + [NX, NX, G, 1 << 50]
    if shape is INTEL64:
        wide += [1 << KEY_SHIFT] * 4 + [15 << KEY_SHIFT]
    extras = st.sampled_from([0] * 9 + [G] if shape is IA32 else wide)
    if paging == "ept":  # global translations outlive a load of CR3, and the oracle knows none
        extras = extras.map(lambda bits: bits & ~G)
    pages = st.sampled_from([*DATA, *DATA, *TABLES[2:]])
    places = [pages] if not below else [st.sampled_from(below)] * 5 + [st.sampled_from(TABLES[2:])]
    named = st.builds(lambda gfn, a, b: gfn << 12 | P | a | b, st.one_of(places), flags, extras)
    large = st.builds(
        lambda gfn, a, b: gfn << 12 | P | PS | a | b,
        st.sampled_from(LARGE_GFNS[shape_name]), flags, extras,
    )  # fmt: skip
    absent = st.sampled_from([0, 0x1234_5000 | RW, 0x20_2000 | PS | P])
    return st.one_of([named] * 6 + [large] * (3 if below else 1) + [absent])


def machine(
    paging: str, shape_name: str, rooms: tuple[int, ...], kind: type[Machine] = Machine
) -> type[RuleBasedStateMachine]:
    """The state machine for one technique and one format; its budget is one of `rooms`."""
    shape = FORMATS[shape_name]
    tiers = levels(shape)
    gvas = st.sampled_from(addresses(shape_name))
    values = [entries(shape_name, paging, below) for below in [*tiers[1:], ()]]
    any_value = st.one_of(values)
    flips = st.sampled_from([RW, US, A, D, A | D, RW | D, P] + [NX] * (shape is not IA32))
    keys: st.SearchStrategy[int | None] = st.just(None)
    if shape is INTEL64:
        keys = st.sampled_from([None, None, 0, 1 << 2, 2 << 2, 2 << 2 | 1 << 30, 0xAAAA_AAAA])
    switches = [st.booleans()] * 4
    modes = st.builds(Mode, *switches, keys)
    places = st.one_of([
        st.tuples(st.sampled_from(gfns), st.sampled_from(indices(shape_name)), value)
        for n, (gfns, value) in enumerate(zip(tiers, values, strict=True))
        for _ in range(n + 1)
    ])  # fmt: skip

    hows = st.sampled_from(EDITS)
    accesses = st.builds(
        Access, gvas, st.booleans(), st.just(False), st.booleans(), st.sampled_from([1, 1, 1, 0])
    )
    uses = st.tuples(*[st.sampled_from(USES)] * 4)

    def revisions(function: Callable[..., None]) -> Callable[..., None]:
        """The same rule under one more name, to be chosen more often."""
        above, plan = st.sampled_from([0, 0, 0, 1, 1, 2, 3]), st.integers(0, 31)
        value = st.tuples(*values)
        drawn = rule(
            gva=gvas, above=above, uses=uses, value=value, flips=flips, how=hows, plan=plan
        )  # fmt: skip
        return drawn(lambda self, **drawn: function(self, **drawn))

    class PagingMachine(RuleBasedStateMachine):
        done = 0  # steps, by all machines of this class
        evictions = 0

        @invariant()
        def count(self) -> None:
            """Called after each step."""
            type(self).done += 1

        @initialize(mode=modes, room=st.sampled_from(rooms))
        def begin(self, mode: Mode, room: int) -> None:
            self.machine = kind(paging, shape, addresses(shape_name), room)
            for tier, below in zip(tiers, [*tiers[1:], DATA], strict=True):
                for n, gfn in enumerate(tier):
                    for k, index in enumerate(indices(shape_name)):
                        target = below[(n + k) % len(below)]
                        self._edit(gfn, index, target << 12 | P | RW | US, "store")
            self.machine.set_mode(mode)

        def teardown(self) -> None:
            if hasattr(self, "machine"):
                type(self).evictions += self.machine.vm.counts()["evictions"]
                self.machine.close()

        def _edit(self, gfn: int, index: int, value: int, how: str) -> None:
            if shape is PAE and gfn in ROOTS:  # a PDPTE has hardly any flags; CR3 loads check it
                value, how = value & (0x3FFF_F000 | P), "xchg" if how == "xchg" else "store"
            self.machine.edit(gfn, index, value, how)

        @rule(place=places, how=hows)
        def edit(self, place: tuple[int, int, int], how: str) -> None:
            self._edit(*place, how)

        @rule(place=places)
        def edit_by_device(self, place: tuple[int, int, int]) -> None:
            if shape is not PAE or place[0] not in ROOTS:
                self.machine.edit_by_device(*place)

        def _revise(
            self, gva: int, above: int, value: tuple[int, ...], flips: int,
            uses: tuple[Access, ...], how: str, plan: int,
        ) -> None:  # fmt: skip
            """Use an address and its neighbor, change an entry of its path, use them again.

            In between, perhaps: use it at once, change it back, invalidate it or everything.
            """
            machine, level = self.machine, max(0, len(tiers) - 1 - above)
            first, second, third, last = (use._replace(gva=gva) for use in uses)
            beside = first._replace(gva=gva ^ 0x1000)
            machine.touch(first, 0x5AFE_0000)
            machine.touch(beside, 0x5AFE_0002)
            machine.touch(second, 0x5AFE_0004)
            place = machine.entry_of(gva, level)
            if place is not None and place[0] in TABLES:
                old = machine.oracle.entry_at(*place)
                self._edit(*place, old ^ flips if plan & 1 else value[level], how)
                if plan & 2:
                    machine.touch(third, 0x5AFE_0006)
                if plan & 4:
                    self._edit(*place, old, how)
            if plan & 8:
                machine.invlpg(gva)
            elif plan & 16:
                machine.load_cr3(machine.oracle.root >> 12)
            machine.touch(last, 0x5AFE_0008)
            machine.touch(beside, 0x5AFE_000A)

        revise = revisions(_revise)
        revise_again = revisions(_revise)
        and_again = revisions(_revise)

        @rule(gva=gvas, other=gvas, how=hows)
        def bury(self, gva: int, other: int, how: str) -> None:
            """A frame in a large page becomes a table."""
            machine, level = self.machine, len(tiers) - 2
            here, there = machine.entry_of(gva, level), machine.entry_of(other, level)
            if here is None or there is None or here == there:
                return
            if here[0] not in TABLES or there[0] not in TABLES:
                return
            full = P | RW | US | A | D
            self._edit(*here, SPARE[0] << 12 | PS | full, how)
            machine.invlpg(gva)
            machine.touch(Access(gva & -0x2000 | WRITE_BESIDE, True, ac=True), 0x5AFE_0000)
            self._edit(*there, SPARE[0] << 12 | full, how)
            machine.invlpg(other)
            machine.touch(Access(other, ac=True), 0)
            machine.touch(Access(gva, True, ac=True), DATA[0] << 12 | full)
            machine.touch(Access(other | 0x1000, ac=True), 0)

        @rule(access=accesses, value=any_value)
        def touch(self, access: Access, value: int) -> None:
            self.machine.touch(access, value & 0xFFFF_FFFF)

        @rule(gva=gvas, user=st.booleans())
        def fetch(self, gva: int, user: bool) -> None:
            self.machine.touch(Access(gva, fetch=True, user=user), 0)

        @rule(gva=gvas, gfn=st.sampled_from(ROOTS), mode=modes, what=st.integers(0, 4))
        def control(self, gva: int, gfn: int, mode: Mode, what: int) -> None:
            """INVLPG, a load of CR3, or other switches."""
            if what == 0:
                self.machine.set_mode(mode)
            elif what < 3:
                self.machine.load_cr3(gfn)
            else:
                self.machine.invlpg(gva)

        @rule(access=accesses, again=accesses, part=st.integers(0, 4),
              frame=st.sampled_from(FRAMES),
              what=st.sampled_from(["move", "take", "protect", "copy"]))  # fmt: skip
        def disturb(self, access: Access, again: Access, part: int, frame: int, what: str) -> None:
            """The hypervisor does something to a frame that is in use, or to any."""
            machine = self.machine
            machine.touch(access, 0x5AFE_0010)
            frames = machine.frames_of(access.gva)
            gfn = frames[part] if part < len(frames) else frame
            if what == "move":
                machine.move(gfn)
            elif what == "take":
                machine.take(gfn)
            else:
                machine.protect(gfn, copy_on_write=what == "copy")
            machine.touch(again._replace(gva=access.gva), 0x5AFE_0012)

    return PagingMachine


def check(paging: str, shape_name: str, steps: int, rooms: tuple[int, ...] = ROOMS) -> int:
    """Run machines of up to `LENGTH` steps until so many steps are done in all.

    Returns how many tables were evicted.
    """
    kind = machine(paging, shape_name, rooms)
    play(kind, steps, LENGTH)
    return int(kind.evictions)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_never_stale_and_eventually_complete(paging: str, shape_name: str) -> None:
    check(paging, shape_name, 500)


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(set(Paging.ALL) - {"ept"}))
def test_with_the_least_budget(paging: str, shape_name: str) -> None:
    assert check(paging, shape_name, 300, (LEAST,)) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_hundred_thousand_steps(paging: str, shape_name: str) -> None:
    check(paging, shape_name, 100_000)
