"""The interpreter and the processor make the same of random instructions, of every width.

What: pieces of `instruction_fuzz`, a few here and many by `make fuzz-emulate`.
Source: SDM 2.  Invariant: what the interpreter carries out itself is most of it.
"""

import os

import pytest

from tests.matrix.instruction_fuzz import MODES, fuzz

PIECES = int(os.environ.get("FUZZ_PIECES", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.parametrize("mode", MODES)
def test_random_instructions(mode: str) -> None:
    interpreted, handed_over = fuzz(mode, PIECES, SEED)
    print(f"{mode}: {interpreted} interpreted, handed over {handed_over.most_common(30)}")
    assert interpreted > 4 * PIECES
    assert handed_over.total() < interpreted
