"""Snapshots that somebody has tampered with: what is in one, changed with its structure in mind.

What: a value becomes another of its kind at an edge, one of another kind, or that of another place;
a key or an item goes, comes, or is doubled; text in hexadecimal gets other bytes; a piece of memory
lies elsewhere.  Source: none.  Invariant: the same seed makes the same mutations.
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

Place = tuple[Any, ...]
State = dict[str, Any]
Pieces = list[tuple[int, bytes]]

EDGES = (0, 1, -1, 2, 3, 7, 8, 63, 64, 255, 256, 511, 512, 4095, 4096, 0xFEE00, 1 << 20, 1 << 28,
         (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 52) - 1, (1 << 63) - 1, 1 << 63,
         (1 << 64) - 1, 1 << 64, -(1 << 63), 1 << 200)  # fmt: skip
OTHERS = (None, True, False, 1.5, "", "x", "00", "auto", [], {}, [0], [[]], {"a": 1}, [1, 2, 3])


def places(state: Any, place: Place = ()) -> Iterator[Place]:
    """The way to everything in a state, containers too."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield (*place, key)
            yield from places(value, (*place, key))


def at(state: Any, place: Place) -> Any:
    """What is there."""
    for key in place:
        state = state[key]
    return state


def mutated(state: State, pieces: Pieces, chance: random.Random) -> tuple[State, Pieces, str]:
    """A copy with one to four changes, and what they are, in words."""
    state, pieces, words = copy.deepcopy(state), list(pieces), []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if chance.random() < 0.05:
            words.append(_move_piece(pieces, chance))
            continue
        # By part, then by depth: else the longest lists get all of it.
        place: Place = (chance.choice(list(state)),)
        while (
            isinstance(inner := at(state, place), dict | list)
            and inner
            and (len(place) < 2 or chance.random() < 0.9)
        ):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            place = (*place, chance.choice(keys))
        words.append(_change(state, place, chance))
        if not state:
            break
    return state, pieces, "; ".join(words)


def _move_piece(pieces: Pieces, chance: random.Random) -> str:
    if not pieces:
        return "no pieces"
    n = chance.randrange(len(pieces))
    gpa, data = pieces[n]
    to = chance.choice((gpa + 4096, gpa - 4096, -4096, chance.choice(EDGES) << 12, gpa))
    pieces[n] = to, chance.choice((data, data[:4096], b""))
    return f"piece {gpa:#x} at {to:#x}, {len(pieces[n][1])} bytes"


def _change(state: State, place: Place, chance: random.Random) -> str:
    holder, key = at(state, place[:-1]), place[-1]
    old = holder[key]
    kind = chance.randrange(10)
    if kind == 0:
        del holder[key]
        return f"{place} gone"
    if kind == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
        return f"{place} doubled"
    if kind == 1:
        name = chance.choice((f"{key}x", str(chance.choice(EDGES)), "0x0e"))
        holder[name] = copy.deepcopy(old)
        return f"{place} also as {name}"
    if kind == 2:
        other = chance.choice(list(places(state)))
        holder[key] = copy.deepcopy(at(state, other))
        return f"{place} is what {other} is"
    if kind == 3:
        holder[key] = copy.deepcopy(chance.choice(OTHERS))
    else:
        holder[key] = _near(old, chance)
    return f"{place} = {json.dumps(holder[key])[:60]}, was {json.dumps(old)[:60]}"


def _near(old: Any, chance: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return chance.choice((
            chance.choice(EDGES), old + chance.choice((1, -1, 8, 4096)),
            old ^ 1 << chance.randrange(64),
        ))  # fmt: skip
    if isinstance(old, str) and old and not set(old) - set("0123456789abcdef"):
        raw = bytearray.fromhex(old if len(old) % 2 == 0 else "0" + old)
        for _ in range(chance.choice((1, 1, 4, 16))):
            byte = chance.choice((0, 1, 0x80, 0xFF, chance.randrange(256)))
            raw[chance.randrange(len(raw))] = byte
        return chance.choice((raw, raw, raw[:-1], raw * 2)).hex()
    if isinstance(old, str):
        return old + chance.choice(("x", "\0", "\u2028"))
    if isinstance(old, list):
        return chance.choice((old[::-1], old * 2, old[: len(old) // 2]))
    if isinstance(old, dict):
        return dict(list(old.items())[: len(old) // 2])
    return chance.choice(EDGES)
