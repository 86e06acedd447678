"""Choices of a VM that are lists: their checks, and how they are read.

Source: ours.  Invariant: what cannot be is a ValueError that says what was expected.
"""

from collections.abc import Callable, Iterable
from typing import Any

DeviceRow = tuple[str, dict[str, int | str | bool | list[int | str | None]]]
"""A further device on the board: its name in `Device.ALL`, where it is, and its options."""

Check = Callable[[str, Any], Any]
"""Given a field's name and a value for it: the value as it is kept, or ValueError."""


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def rows(what: str, value: Iterable[DeviceRow]) -> tuple[DeviceRow, ...]:
    """Rows of a board."""
    try:
        return tuple(
            (
                _text(name),
                {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()},
            )
            for name, row in value
        )
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{what} {value!r}: expected rows like ('uart16550', {{}})") from None


def each(kind: Any, most: int, expected: str) -> Check:
    """The check of a tuple of values that `kind` can parse from a text."""

    def check(what: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | kind):
            value = (value,)
        try:
            made = tuple(kind.parse(one) if isinstance(one, str) else one for one in value)
        except TypeError:
            made = (None,)
        if not all(isinstance(one, kind) for one in made):
            raise ValueError(f"{what} {value!r}: expected {expected}")
        if len(made) > most:
            raise ValueError(f"{what}: {len(made)} of them, expected {most} at most")
        return made

    return check


def names(text: str) -> tuple[str, ...]:
    """Of a text with commas."""
    return tuple(text.split(","))


def texts(what: str, value: Iterable[str]) -> tuple[str, ...]:
    """Names, each once."""
    if isinstance(value, str):
        value = names(value)
    try:
        found = tuple(dict.fromkeys(value))
    except TypeError:
        found = (None,)  # type: ignore[assignment]
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{what} {value!r}: expected names, like ('rdtsc', 'invlpg')")
    return found


def names_of_devices(text: str) -> tuple[DeviceRow, ...]:
    """Devices at their usual places."""
    return tuple((name, {}) for name in text.split(","))
