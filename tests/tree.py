"""The source tree as the house tests see it.

What: which files there are, what they import.  Source: the working tree (build products left out).
Invariant: knows nothing about the rules themselves.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = {"build", "dist"}  # by make
_SKIPPED = BUILT | {"target", "__pycache__", ".venv", ".git"}


def files(folder: str, *suffixes: str) -> Iterator[Path]:
    """Every source file below `folder`, relative to the root, sorted."""
    for path in sorted((ROOT / folder).rglob("*")):
        relative = path.relative_to(ROOT)
        if path.suffix in suffixes and path.is_file() and not _SKIPPED & set(relative.parts):
            yield relative


def text(path: Path) -> str:
    """The text of a file named by its path from the root."""
    return (ROOT / path).read_text(encoding="utf-8")


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(text(path), filename=str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules (and `from` names) that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
