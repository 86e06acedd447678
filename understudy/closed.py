"""A closed thing says that it is closed, whatever one asks of it.

Source: ours.  Invariant: what one may still ask is named by the class; nothing else reaches parts
that are given back.
"""

import functools
from collections.abc import Callable, Container
from types import FunctionType
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def let_go(*parts: object) -> None:
    """Take from closed parts all that they hold.

    Parts of a VM hold each other, and only a garbage collection would end that.
    """
    for part in parts:
        vars(part).clear()


def says_closed(
    *still: str, gone: Container[str] = frozenset()
) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: when `is_closed`, public methods and properties raise RuntimeError.

    `still` are the names that are answered all the same; `close` is always.  `gone` are attributes
    that a closed one has no more; who asks for them hears why.
    """

    def missing(self: Any, name: str) -> Any:
        if name in gone and vars(self).get("is_closed"):
            raise RuntimeError(f"{self.name} is closed")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def decorate(kind: type[Kind]) -> type[Kind]:
        if gone:
            kind.__getattr__ = missing  # type: ignore[attr-defined]
        for name, value in list(vars(kind).items()):
            if name.startswith("_") or name in still or name == "close":
                continue
            if isinstance(value, FunctionType):
                setattr(kind, name, _checked(value))
            elif isinstance(value, property):
                getter = None if value.fget is None else _checked(value.fget)
                setter = None if value.fset is None else _checked(value.fset)
                setattr(kind, name, property(getter, setter, doc=value.__doc__))
        return kind

    return decorate


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, /, *args: Any, **options: Any) -> Any:
        if self.is_closed:
            raise RuntimeError(f"{self.name} is closed")
        return function(self, *args, **options)

    return method
