"""No module of understudy imports itself in a circle, for types neither.

What: every import counts, those under TYPE_CHECKING and inside functions too.  A package is the
module in its `__init__.py`; to be inside of it is no import of it.
Source: Parnas, "Designing Software for Ease of Extension and Contraction": parts that need each
other cannot be had, tested or understood apart.
Invariant: a circle is shown as a path from a module back to itself, the shortest one there is.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.tree import files, imported, parsed

SOURCES = list(files("understudy", ".py", ".pyi"))  # the compiled module is known by its stub
Graph = Mapping[str, set[str]]


def module_name(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(names: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Which of the modules each imports, by what each names in its imports."""
    found: dict[str, set[str]] = {}
    for module, wanted in names.items():
        found[module] = set()
        for name in wanted:
            # `from package import module` names the module; anything else in a module, the module.
            owner = name
            while owner and owner not in names:
                owner = owner.rpartition(".")[0]
            if owner and owner != module:
                found[module].add(owner)
    return found


def shortest_circle(imports: Graph) -> list[str]:
    """A path from a module back to itself; empty if there is none."""
    best: list[str] = []
    for start in sorted(imports):
        before: dict[str, str] = {}
        queue = deque([start])
        while queue:
            module = queue.popleft()
            for after in sorted(imports[module]):
                if after == start:
                    path = [start]
                    while module != start:
                        path.insert(1, module)
                        module = before[module]
                    path.append(start)
                    if not best or len(path) < len(best):
                        best = path
                    queue.clear()
                    break
                if after not in before:
                    before[after] = module
                    queue.append(after)
    return best


def entangled(imports: Graph) -> list[list[str]]:
    """The groups of modules that all reach each other, the largest first."""
    reach: dict[str, set[str]] = {}
    for start in imports:
        seen: set[str] = set()
        stack = [start]
        while stack:
            fresh = imports[stack.pop()] - seen
            seen |= fresh
            stack += fresh
        reach[start] = seen
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in imports
        if module in reach[module]
    }
    return sorted(map(list, groups), key=len, reverse=True)


def _named(path: Path) -> Iterable[str]:
    """What a file imports; `from a import b` only as `a.b`, which says what of `a` is meant."""
    names = list(imported(parsed(path)))
    return [n for n in names if not any(other.startswith(n + ".") for other in names)]


def test_no_circle_of_imports() -> None:
    """Each part can be read alone, from the bottom up."""
    imports = graph({module_name(path): _named(path) for path in SOURCES})
    circles = entangled(imports)
    words = [
        f"{len(group)} modules import each other: "
        + " -> ".join(shortest_circle({m: imports[m] & set(group) for m in group}))
        + (f"; also there: {', '.join(group)}" if len(group) > 2 else "")
        for group in circles
    ]
    assert not words, "\n".join(words)


def test_a_circle_is_found_and_shown_as_a_path() -> None:
    names = {
        "p": ["p.a"],
        "p.a": ["p.b.thing", "os"],
        "p.b": ["p.c"],
        "p.c": ["p.d", "p.a.Other"],
        "p.d": ["p"],
        "p.e": ["p.a"],
    }
    imports = graph(names)
    assert imports["p.a"] == {"p.b"}
    assert shortest_circle(imports) == ["p.a", "p.b", "p.c", "p.a"]
    assert entangled(imports) == [["p", "p.a", "p.b", "p.c", "p.d"]]
    assert entangled(graph(names | {"p.c": ["p.d"]})) == [["p", "p.a", "p.b", "p.c", "p.d"]]
    assert entangled(graph(names | {"p.c": []})) == []
    assert shortest_circle(graph(names | {"p.c": []})) == []
