"""Fetched guests for the tests, or the reason to skip a test.

What: a guest by name from the cache or, once, through the package client.
Invariant: a test is skipped only if the guest cannot be had, never because it does not work.
"""

import pytest

from understudy.guests import debian
from understudy.guests.debian import Guest
from understudy.guests.entry import GuestError

KERNELS = ("cloud-amd64", "amd64", "cloud-amd64-6.12", "686", "686-pae")
"""Debian's, by the names of their guests."""


def fetched(name: str) -> Guest:
    """The guest, or the test is skipped with the reason why it is not to be had."""
    try:
        return debian.fetch(name)
    except GuestError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")
