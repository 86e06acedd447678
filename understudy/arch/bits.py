"""Bit layouts written like the manual's tables: most significant bit first, one line a field.

A subclass of `Bits` is an immutable integer with named fields.  Source: the idea of the tables
in the SDM and in every data sheet; gem5 and seL4 write their registers in a similar way.

Invariants: the fields of one layout lie inside its width, do not overlap, and stand in
descending order; anything else is a TypeError when the class is made.

    >>> class LSR(Bits, width=8):
    ...     TEMT = Bit(6)  # transmitter empty
    ...     DR = Bit(0)  # data ready
    >>> LSR(0x41)
    LSR(TEMT DR)
    >>> LSR(DR=1).TEMT
    False
    >>> hex(LSR.TEMT.mask)
    '0x40'
"""

from typing import Any, ClassVar, Self, overload


class Field:
    """Bits high..low of a layout.  On an instance it reads as an int, on the class as itself."""

    __slots__ = ("high", "low", "mask", "name")

    def __init__(self, high: int, low: int) -> None:
        if not high >= low >= 0:
            raise TypeError(f"Field({high}, {low}): expected high >= low >= 0, high bit first")
        self.high, self.low = high, low
        self.mask = ((1 << (high - low + 1)) - 1) << low
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(self, instance: "Bits", owner: Any = None) -> int: ...
    def __get__(self, instance: "Bits | None", owner: Any = None) -> "Self | int":
        return self if instance is None else (int(instance) & self.mask) >> self.low

    def put(self, value: int) -> int:
        """The value moved to the field's place; ValueError if it does not fit."""
        if not 0 <= value <= self.mask >> self.low:
            bits = self.high - self.low + 1
            raise ValueError(f"{self.name}={value:#x}: the field has {bits} bit(s)")
        return value << self.low


class Bit(Field):
    """A single bit.  On an instance it reads as a bool."""

    __slots__ = ()

    def __init__(self, number: int) -> None:
        super().__init__(number, number)

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(self, instance: "Bits", owner: Any = None) -> bool: ...
    def __get__(self, instance: "Bits | None", owner: Any = None) -> "Self | bool":
        return self if instance is None else bool(int(instance) & self.mask)


class Bits(int):
    """An immutable integer of `width` bits with the fields that its subclass names."""

    WIDTH: ClassVar[int] = 0
    FIELDS: ClassVar[tuple[Field, ...]] = ()

    def __init_subclass__(cls, width: int) -> None:
        fields = tuple(f for f in vars(cls).values() if isinstance(f, Field))
        above = width
        for f in fields:
            if f.high >= above:
                raise TypeError(
                    f"{cls.__name__}.{f.name} ends at bit {f.high}, expected below {above}: "
                    "fields go from the most significant bit down and may not overlap"
                )
            above = f.low
        cls.WIDTH, cls.FIELDS = width, fields

    def __new__(cls, value: int = 0, **fields: int) -> Self:
        if not 0 <= value < 1 << cls.WIDTH:
            raise ValueError(f"{cls.__name__}({value:#x}): the register has {cls.WIDTH} bits")
        return super().__new__(cls, _merge(cls, value, fields))

    def replace(self, **fields: int) -> Self:
        """The same value with some fields changed."""
        return type(self)(_merge(type(self), int(self), fields))

    @classmethod
    def layout(cls) -> list[tuple[str, int, int]]:
        """(name, high, low) of each field, for comparing with the Rust half."""
        return [(f.name, f.high, f.low) for f in cls.FIELDS]

    def __repr__(self) -> str:
        rest, words = int(self), []
        for f in self.FIELDS:
            value = (int(self) & f.mask) >> f.low
            rest &= ~f.mask
            if value:
                words.append(f.name if isinstance(f, Bit) else f"{f.name}={value:#x}")
        if rest:
            words.append(f"reserved={rest:#x}")
        return f"{type(self).__name__}({' '.join(words) or '0'})"

    __str__ = __repr__


def _merge(cls: type[Bits], value: int, fields: dict[str, int]) -> int:
    for name, part in fields.items():
        f = cls.__dict__.get(name)
        if not isinstance(f, Field):
            known = " ".join(x.name for x in cls.FIELDS)
            raise TypeError(f"{cls.__name__} has no field {name}; it has {known}")
        value = value & ~f.mask | f.put(int(part))
    return value
