"""A class of the user's own, from the path of a file that has it.

Source: ours.  Invariant: what came from a file is not among the names that all can use.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Final, TypeVar

_FROM_FILE: Final = "_own_class_"
_numbers = itertools.count()

T = TypeVar("T")


def is_own(kind: type) -> bool:
    """Whether a class came from a file of the user's."""
    return kind.__module__.startswith(_FROM_FILE)


def class_of_file(path: Path, base: type[T], error: type[ValueError], words: str) -> type[T]:
    """The one class in a file that is derived from `base`.

    `error` is raised if there is not exactly one; `words` are what the class is, for people.
    """
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
