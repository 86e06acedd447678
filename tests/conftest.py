"""What every test may lean on.

What: fixtures shared by several folders.  Source: none.  Invariant: no fixture hides a decision
that the test is about.
"""

from collections.abc import Iterator

import pytest

# Text that the command line prints must not depend on who runs the tests.
_PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in _PLAIN.items():
        monkeypatch.setenv(name, value)
    yield
