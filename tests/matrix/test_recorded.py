"""What others have recorded of single instructions in real-address mode, both techniques repeat.

What: each row of the recording that lies in RAM, interpreted and executed; UNDERSTUDY_VECTORS
names the file, if it is not in ../shared/data.
Source: the file, of an 80286; SDM 3B, "Architecture Compatibility", for what is different since.
Invariant: the two techniques agree on every row, and differ from the recording only where the
processor of the recording does what none does today.
"""

from typing import Any

import pytest

from tests.matrix.recorded import AF, CF, MISSING, OF, VECTORS, differs, outcome, rows, undefined
from understudy.execution.emulate import Emulate
from understudy.vm import VM

PORTS = ("E4", "E5", "E6", "E7", "EC", "ED", "EE", "EF", "6C", "6D", "6E", "6F")
STRINGS = ("A4", "A5", "A6", "A7", "AA", "AB", "AC", "AD", "AE", "AF")
DIVIDE, UNDEFINED, PROTECTION = 0, 6, 13


def is_of_its_time(row: dict[str, Any]) -> bool:
    """Whether the 80286 does otherwise than its successors."""
    form, vector = row["f"], row["x"]
    if vector == DIVIDE:
        return form.startswith(("F6", "F7"))  # the flags that it pushes are undefined
    if vector == UNDEFINED:
        return "fs" in row["n"] or "gs" in row["n"]  # it has no such registers
    if vector == PROTECTION:  # it leaves SI and DI advanced; and has no #SS in real mode
        return form in STRINGS or form == "C9" or "[bp" in row["n"]
    return False


@pytest.mark.parametrize(
    ("form", "count", "flags"),
    [
        ("C0.0", 32, 0), ("C0.0", 1, 0), ("C0.0", 2, OF), ("C1.3", 33, 0), ("C1.2", 17, OF),
        ("C0.4", 64, 0), ("C0.4", 1, AF), ("C0.4", 7, OF | AF), ("C0.5", 8, OF | AF | CF),
        ("C1.6", 15, OF | AF), ("C1.5", 16, OF | AF | CF), ("C0.7", 9, OF | AF),
        ("D2.4", 40, OF | AF | CF), ("D3.7", 0, 0), ("D1.4", 40, AF), ("D0.1", 40, 0),
        ("80.4", 0, AF), ("80.5", 0, 0), ("27", 0, OF), ("D4", 0, OF | AF | CF),
    ],
)  # fmt: skip
def test_no_more_is_left_out_than_is_undefined(form: str, count: int, flags: int) -> None:
    row = {"f": form, "b": f"{form[:2]}00{count:02x}f4", "i": [{"cx": 0xAB00 | count}, []]}
    assert undefined(row) == flags


@pytest.mark.skipif(not VECTORS.is_file(), reason=MISSING)
def test_every_row() -> None:
    with VM("2M", execution="emulate") as one, VM("2M", engine="reference") as other:
        compared, guest = 0, one.vcpus[0].guest
        assert isinstance(guest, Emulate)
        for row in rows(VECTORS):
            if row["f"] in PORTS:
                continue  # there are other devices behind them
            found = outcome(one, row)
            assert found == outcome(other, row), row
            wrong = differs(row, found)
            assert not wrong or is_of_its_time(row), (row["n"], wrong)
            compared += 1
        assert compared > 6000
        assert guest.interpreted > 0.9 * compared
