"""How much memory a guest needs that did not fit: found by loading it again, into none at all.

Source: none.  Invariants: the least size that is named is one into which it can be loaded, and one
MiB less is not; if there is none, that is said, and no advice given.
"""

from collections.abc import Callable
from typing import Final

from understudy.config import LARGEST
from understudy.guests.entry import Entry, GuestError, GuestMemory
from understudy.guests.placement import MIB, NoRoom, Pretended

STEP: Final = 8 * MIB


def advice(load: Callable[[GuestMemory], Entry], size: int, unpacked: int) -> str:
    """What to do about a guest that cannot be loaded into `size` bytes of memory.

    unpacked: what its initrd takes once more when it runs.
    """
    low, high = -(-size // MIB), 2 * -(-size // MIB)
    while not _fits(load, high * MIB):
        low, high = high, 2 * high
        if high * MIB > LARGEST:
            return "and no size of memory would do: no PC has RAM there"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(load, middle * MIB) else (middle, high)
    enough = -(-(high * MIB + unpacked) * 5 // 4 // STEP) * STEP
    return (
        f"give it at least {high}M, into which it can be loaded; "
        f"a Linux needs some more to run: try {enough // MIB}M"
    )


def _fits(load: Callable[[GuestMemory], Entry], size: int) -> bool:
    try:
        load(Pretended(size))
    except NoRoom:
        return False
    except GuestError:
        return True  # it fails for another reason, which more memory will bring up
    return True
