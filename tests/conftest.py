"""What every test may lean on.

What: fixtures shared by several folders.  Source: none.  Invariant: no fixture hides a decision
that the test is about.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import BUILT, ROOT

# A shell without job control starts what runs in the background deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Text that the command line prints must not depend on who runs the tests.
_PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in _PLAIN.items():
        monkeypatch.setenv(name, value)
    yield


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    """A test leaves nothing in the working tree, nor where it was started.

    What make builds may appear at any time: tests run beside each other.
    """
    places = {ROOT, Path.cwd()}
    before = {path for place in places for path in place.iterdir()}
    yield
    left = {path for place in places for path in place.iterdir()} - before
    assert not [path for path in left if path.name not in BUILT and path.name[0] != "."]
