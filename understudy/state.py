"""Parts that keep their state, and their state as plain values and back.

A part has one dataclass, `state`, with all that a snapshot must keep; the rest of it is wiring.

Plain means what JSON has: dict, list, str, int, bool, None.  Byte arrays become hex strings.
An `int` of a state has at most 64 bits; a register that has fewer says so: U8, U16, U32.  So do
lists and byte arrays that have their length: `Annotated[bytearray, 128]`.

Source: ours.  Invariants: `restore(type(x), plain(x)) == x` for every state dataclass, and
`restore` raises ValueError, naming the place, for anything that does not fit the type.
"""

import types
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Final,
    Protocol,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

PLAIN: Final[dict[Any, type]] = {bytearray: str, bytes: str, tuple: list, Counter: dict}
"""What values of these types become."""


U2: TypeAlias = Annotated[int, 2]
U3: TypeAlias = Annotated[int, 3]
U8: TypeAlias = Annotated[int, 8]
U9: TypeAlias = Annotated[int, 9]
U16: TypeAlias = Annotated[int, 16]
U32: TypeAlias = Annotated[int, 32]
U62: TypeAlias = Annotated[int, 62]
U64: TypeAlias = Annotated[int, 64]


class Kept(Protocol):
    """What can be in a snapshot."""

    def save(self) -> dict[str, Any]: ...
    def load(self, saved: dict[str, Any]) -> None: ...


class Part:
    """Whatever keeps itself in snapshots."""

    state: Any  # a dataclass of plain values

    def save(self) -> dict[str, Any]:
        """Everything that a snapshot must keep, as plain values."""
        saved: dict[str, Any] = plain(self.state)
        return saved

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved.  ValueError if it does not fit."""
        self.state = restore(type(self.state), saved, type(self).__name__)


def plain(value: Any) -> Any:
    """A deep copy made of plain values."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case bytes() | bytearray():
            return value.hex()
        case dict():
            return {_key(k): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
    raise TypeError(f"state holds a {type(value).__name__}; expected plain values or dataclasses")


def restore(kind: Any, value: Any, where: str = "state") -> Any:
    """The value of type `kind` that `plain` turned into `value`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = restore(args[0], value, where)
        if args[0] is int and found >> args[1]:
            raise ValueError(f"snapshot: {where} is {found:#x}, expected {args[1]} bits")
        if args[0] is not int and len(found) != args[1]:
            raise ValueError(f"snapshot: {where} has {len(found)} items, expected {args[1]}")
        return found
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fitting = (
            [a for a in kinds if (get_origin(a) or a) is type(value)] if len(kinds) > 1 else kinds
        )
        if not fitting:
            names = " or ".join(str(getattr(a, "__name__", a)) for a in kinds)
            raise ValueError(f"snapshot: {where} is {value!r:.40}, expected {names}")
        return restore(fitting[0], value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints = get_type_hints(kind, include_extras=True)
        args = tuple(hints[name] for name in kind._fields)
        return kind(*restore(tuple[args], value, where))  # type: ignore[valid-type]
    expected = PLAIN.get(origin or kind, origin or kind)
    if isinstance(kind, type) and issubclass(kind, int) and kind is not bool:
        expected = int
    if type(value) is not expected:
        raise ValueError(f"snapshot: {where} is {value!r:.40}, expected {expected.__name__}")
    if kind is int and not -(1 << 63) <= value < 1 << 64:
        raise ValueError(
            f"snapshot: {where} is a number of {value.bit_length()} bits, expected 64 at most"
        )
    if kind is bytearray or kind is bytes:
        return kind.fromhex(value)
    if origin is list:
        return [restore(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ValueError(f"snapshot: {where} has {len(value)} items, expected {len(args)}")
        return tuple(restore(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))  # noqa: B905
    if origin is dict:
        return {args[0](k): restore(args[1], v, f"{where}[{k}]") for k, v in value.items()}
    if origin is Counter:
        return Counter({args[0](k): restore(int, v, f"{where}[{k}]") for k, v in value.items()})
    return kind(value)


def _key(key: Any) -> str:
    return str(int(key) if isinstance(key, int) else key)


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"snapshot: {where} is {value!r:.40}, expected a dict")
    hints = get_type_hints(kind, include_extras=True)
    if value.keys() != {f.name for f in fields(kind)}:
        names = set(value) ^ {f.name for f in fields(kind)}
        raise ValueError(f"snapshot: {where} and {kind.__name__} differ in {sorted(names)}")
    return kind(**{k: restore(hints[k], v, f"{where}.{k}") for k, v in value.items()})
