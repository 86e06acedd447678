"""What others have recorded of single instructions in real-address mode, both techniques repeat.

What: each row of the recording that lies in RAM, interpreted and executed; UNDERSTUDY_VECTORS
names the file.
Source: the file, of an 80286; SDM 3B, "Architecture Compatibility", for what is different since.
Invariant: the two techniques agree on every row, and differ from the recording only where the
processor of the recording does what none does today.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.recorded import differs, outcome, rows
from understudy.execution.emulate import Emulate
from understudy.vm import VM

VECTORS = Path(os.environ.get("UNDERSTUDY_VECTORS", ""))
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


@pytest.mark.skipif(not VECTORS.is_file(), reason="UNDERSTUDY_VECTORS names no file of recordings")
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
