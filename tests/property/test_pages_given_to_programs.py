"""A supervisor's page becomes a program's, and the supervisor is kept out from then on.

What: SMEP and SMAP, at the page itself and at the table above it.  Source: SDM 3A, "Access Rights".
Invariant: a right that programs get may be one that the supervisor loses; processors hear of it.
"""

import pytest

from tests.property.paging_machine import DATA, FORMATS, ROOTS, Machine
from tests.property.paging_oracle import PAE, RW, US, Access, Mode, P
from tests.property.small_spaces import link, tables_of
from understudy.paging import Paging

OWN = P | RW


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("fetch", [False, True])
def test_the_supervisor_is_kept_out(paging: str, shape_name: str, above: int, fetch: bool) -> None:
    machine = Machine(paging, FORMATS[shape_name], [0], 0)
    shape = machine.shape
    chain = [*tables_of(shape), DATA[0]]
    late = chain[-2 - above]
    if shape is PAE and late == ROOTS[0]:
        late = chain[-2]
    link(machine, chain, {late: OWN})
    machine.set_mode(Mode(smep=True, smap=True, nxe=machine.oracle.mode.nxe))
    access = Access(0, fetch=fetch)
    machine.touch(access, 0)
    assert machine.oracle.fresh(access).error is None
    entry = machine.oracle.entry_at(late, 0)
    machine.edit(late, 0, entry | US, "or")
    machine.invlpg(0)
    assert machine.oracle.fresh(access).error is not None
    machine.touch(access, 0)
    machine.close()
