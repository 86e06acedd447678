"""One of the ways there are to do a thing: by name, or a class of the user's own, by its file.

Source: ours.  Invariant: what came from a file is not among the names that all can use.
"""

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

_FROM_FILE: Final = "_own_class_"
_numbers = itertools.count()

T = TypeVar("T")


def is_own(kind: type) -> bool:
    """Whether a class came from a file of the user's."""
    return kind.__module__.startswith(_FROM_FILE)


def chosen(
    wish: str | Path | T | type[T], base: type[T], known: Mapping[str, type[T]],
    error: type[ValueError], words: str,
) -> T:  # fmt: skip
    """What was wished for: by name, by the path of a file, a class or an object.

    `error` is raised, in one line, if it is none; `words` are what such a class is, for people.
    """
    if isinstance(wish, base):
        return wish
    if isinstance(wish, type):
        return wish()
    kind = known.get(str(wish))
    if kind is None:
        path = Path(str(wish))
        if not path.is_file():
            names = ", ".join(sorted(known))
            raise error(f"{words} {str(path)!r}: expected one of {names}, or the path of a file")
        kind = _class_of_file(path, base, error, words)
    return kind()


def _class_of_file(path: Path, base: type[T], error: type[ValueError], words: str) -> type[T]:
    """The one class in a file that is derived from `base`; `error` if there is not exactly one."""
    spec = importlib.util.spec_from_file_location(f"{_FROM_FILE}{next(_numbers)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        one for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, base) and one.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        raise error(
            f"{words} {path}: expected one class that is a {base.__name__}, found {len(found)}"
        )
    return found[0]
