"""Addresses of network cards: a card has one of its own among all of this process.

Source: IEEE 802, "Universal addresses and local addresses": the second bit of the first byte says
that nobody but we gave it.
Invariant: with the same names, in the same order, cards get the same addresses.
"""

import threading
from hashlib import blake2b
from typing import Any, Final, Protocol
from weakref import WeakSet

from understudy.backends.frame import GROUP, MAC_BYTES

PREFIX: Final = b"\x52\x54"  # locally administered
_LOCK: Final = threading.Lock()


class Holder(Protocol):
    """A card."""

    own: bytes


CARDS: "WeakSet[Holder]" = WeakSet()


def claim(card: Holder, mac: bytes | None, name: str) -> None:
    """The card gets this address, or, if there is none, one that follows from a name."""
    with _LOCK:
        used = {other.own for other in CARDS if other is not card}
        card.own = address_of(name, used) if mac is None else mac
        CARDS.add(card)


def release(card: Holder) -> None:
    """The card is gone."""
    with _LOCK:
        CARDS.discard(card)


def address_of(name: str, used: set[bytes]) -> bytes:
    """The address that follows from a name, and is none of those in use."""
    count = 0
    while (mac := PREFIX + _hashed(f"{name}\0{count}")) in used:
        count += 1
    return mac


def _hashed(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return blake2b(raw, digest_size=MAC_BYTES - len(PREFIX)).digest()


def is_one_cards(mac: Any) -> bool:
    """Whether it is an address that a card can have."""
    return isinstance(mac, bytes) and len(mac) == MAC_BYTES and not mac[0] & GROUP and any(mac)
