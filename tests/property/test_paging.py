"""Every way to virtualise memory against one oracle, in every paging format.

What: a Hypothesis state machine: the guest edits its tables, flushes, loads CR3, touches; the
hypervisor moves, removes and write-protects frames.  Source: the invariants of
`understudy.paging`.  What is checked: see `paging_machine`.
"""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.property.paging_machine import DATA, EDITS, FORMATS, ROOTS, TABLES, Machine
from tests.property.paging_oracle import (
    IA32,
    INTEL64,
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
)
from understudy.paging import Paging

LARGE_GFNS = (0, 0x200, 0x400)
FOUR_MEGA_GFNS = (0, 0x400)
FRAMES = (*TABLES, *DATA)


def indices(shape_name: str) -> list[int]:
    """The entries that are edited; for IA-32, in each part that has a shadow of its own."""
    return [0, 1, 257, 513] if shape_name == "IA-32" else [0, 1]


def addresses(shape_name: str) -> list[int]:
    """The pages that are touched."""
    if shape_name == "IA-32":
        return [i << 22 | j << 12 for i in (0, 1, 257, 513) for j in (0, 1, 513)]
    shifts = FORMATS[shape_name].shifts
    return [
        sum((bits >> n & 1) << shift for n, shift in enumerate(shifts))
        for bits in range(1 << len(shifts))
    ]


def machine(paging: str, shape_name: str) -> type[RuleBasedStateMachine]:
    """The state machine for one technique and one format."""
    shape = FORMATS[shape_name]
    gvas = st.sampled_from(addresses(shape_name))
    # Rights that let something through are likelier, or nothing would ever be reached.
    flags = st.sampled_from(
        [RW | US, RW | US, RW | US | A, RW | US | A | D, US, US | A, RW, RW | A | D, 0]
    )
    extras = st.sampled_from(
        [0] * 12 + [NX, NX, G, 1 << 50, 1 << 13] if shape is not IA32 else [0] * 9 + [G]
    )
    if paging == "ept":  # global translations outlive a load of CR3, and the oracle knows none
        extras = extras.map(lambda bits: bits & ~G)

    @st.composite
    def entries(draw: st.DrawFn) -> int:
        kind = draw(st.sampled_from(["table", "table", "table", "page", "page", "large", "none"]))
        if kind == "none":
            return draw(st.sampled_from([0, 0x1234_5000 | RW]))
        bits = P | draw(flags) | draw(extras)
        if kind == "large":
            places = FOUR_MEGA_GFNS if shape is IA32 else LARGE_GFNS
            return draw(st.sampled_from(places)) << 12 | PS | bits & ~(1 << 13)
        gfns = TABLES[2:] if kind == "table" else (*DATA, *TABLES[2:4])
        return draw(st.sampled_from(gfns)) << 12 | bits & ~(1 << 13)

    class PagingMachine(RuleBasedStateMachine):
        steps = 0

        @initialize()
        def begin(self) -> None:
            self.machine = Machine(paging, shape)
            # A way to each level that is there from the beginning.
            for gfn, below in zip(ROOTS, (TABLES[2], TABLES[3]), strict=True):
                self._edit(gfn, 0, below << 12 | P | RW | US, "store")
            for gfn in range(TABLES[2], TABLES[-1]):
                self._edit(gfn, 0, gfn + 1 << 12 | P | RW | US, "store")

        def teardown(self) -> None:
            if hasattr(self, "machine"):
                self.machine.close()

        def _edit(self, gfn: int, index: int, value: int, how: str) -> None:
            if shape is PAE and gfn in ROOTS:  # a PDPTE has hardly any flags; CR3 loads check it
                value, how = value & (0x3FFF_F000 | P), "store" if how != "xchg" else how
            self.machine.edit(gfn, index, value, how)

        @rule(gfn=st.sampled_from(TABLES), index=st.sampled_from(indices(shape_name)),
              value=entries(), how=st.sampled_from(EDITS))  # fmt: skip
        def edit(self, gfn: int, index: int, value: int, how: str) -> None:
            self._edit(gfn, index, value, how)

        @rule(gfn=st.sampled_from(TABLES[2:]), index=st.sampled_from(indices(shape_name)),
              value=entries())  # fmt: skip
        def edit_by_device(self, gfn: int, index: int, value: int) -> None:
            self.machine.edit_by_device(gfn, index, value)

        @rule(gva=gvas)
        def invlpg(self, gva: int) -> None:
            self.machine.invlpg(gva)

        @rule(gfn=st.sampled_from(ROOTS))
        def load_cr3(self, gfn: int) -> None:
            self.machine.load_cr3(gfn)

        @rule(mode=st.builds(Mode, st.booleans(), st.booleans(), st.booleans(), st.booleans()))
        def set_mode(self, mode: Mode) -> None:
            self.machine.set_mode(mode)

        @rule(access=st.builds(Access, gvas, st.booleans(), st.just(False), st.booleans(), st.booleans()),
              value=entries())  # fmt: skip
        def touch(self, access: Access, value: int) -> None:
            self.machine.touch(access, value & 0xFFFF_FFFF)

        @rule(access=st.builds(Access, gvas, st.booleans(), st.just(False), st.booleans(), st.booleans()),
              value=entries())  # fmt: skip
        def touch_again(self, access: Access, value: int) -> None:
            self.machine.touch(access, value & 0xFFFF_FFFF)

        @rule(gva=gvas, user=st.booleans())
        def fetch(self, gva: int, user: bool) -> None:
            self.machine.touch(Access(gva, fetch=True, user=user), 0)

        @rule(gfn=st.sampled_from(FRAMES))
        def move(self, gfn: int) -> None:
            self.machine.move(gfn)

        @rule(gfn=st.sampled_from(FRAMES))
        def take(self, gfn: int) -> None:
            self.machine.take(gfn)

        @rule(gfn=st.sampled_from(FRAMES), copy_on_write=st.booleans())
        def protect(self, gfn: int, copy_on_write: bool) -> None:
            self.machine.protect(gfn, copy_on_write)

    return PagingMachine


def check(paging: str, shape_name: str, examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine(paging, shape_name),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
            derandomize=True,
            print_blob=False,
        ),
    )


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_never_stale_and_eventually_complete(paging: str, shape_name: str) -> None:
    check(paging, shape_name, examples=20, steps=50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_hundred_thousand_steps(paging: str, shape_name: str) -> None:
    check(paging, shape_name, examples=1000, steps=100)
