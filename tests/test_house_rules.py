"""The rules of the house, each with its reason.

Source: CONTRIBUTING.md, "Style".  A rule that a tool checks (format, types) is `make check`'s.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT, files, parsed, text

PACKAGE = list(files("understudy", ".py"))
OURS = [*PACKAGE]
for _folder in ("experiments", "tests", "examples", "tools"):
    OURS += files(_folder, ".py")
RUST = [*files("silicon", ".rs")]

_FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
_QUESTIONS = ("is_", "has_", "may_")
_FORBIDDEN_SUFFIXES = ("manager", "handler", "handlers", "processor")


@pytest.mark.parametrize(("paths", "cap"), [(OURS, 400), (RUST, 600)], ids=["python", "rust"])
def test_files_are_short(paths: list[Path], cap: int) -> None:
    """A file that fits in the head: 400 lines of Python, 600 of Rust."""
    long = {str(path): n for path in paths if (n := text(path).count("\n")) > cap}
    assert long == {}


def test_modules_are_named_for_what_they_hold() -> None:
    """Nobody can guess what is in utils.py, and everybody adds to it."""
    offenders = [
        path
        for path in [*OURS, *RUST]
        if path.stem in _FORBIDDEN_NAMES
        or (path.stem.endswith(_FORBIDDEN_SUFFIXES) and path.name != "processor.rs")
    ]
    assert offenders == []


def test_no_star_imports() -> None:
    """A reader must be able to find where a name comes from."""
    offenders = [
        path
        for path in OURS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
    ]
    assert offenders == []


def _public_without_docstring(path: Path) -> Iterator[str]:
    tree = parsed(path)
    if not ast.get_docstring(tree):
        yield f"{path}: the module"

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        documented_elsewhere = isinstance(node, ast.ClassDef) and bool(node.bases)
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_"):
                continue
            inherited = documented_elsewhere and not isinstance(child, ast.ClassDef)
            if not ast.get_docstring(child) and not inherited and not _says_it_by_its_name(child):
                yield f"{path}:{child.lineno}: {prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(tree, "")


def _says_it_by_its_name(node: ast.AST) -> bool:
    """Setters repeat the getter; a question of one line (`is_armed`) reads as an assertion."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if any(d.endswith((".setter", "overload")) for d in decorators):
        return True
    return "property" in decorators and node.name.startswith(_QUESTIONS) and len(node.body) == 1


def test_public_names_have_docstrings() -> None:
    """Methods of a subclass may inherit theirs; everything else says what it is for."""
    offenders = [line for path in PACKAGE for line in _public_without_docstring(path)]
    assert offenders == []


def test_manuals_are_cited_by_title() -> None:
    """Section numbers of the SDM move between editions; titles stay."""
    number = re.compile(r"\bSDM\b[^\n\"]{0,24}(?:section|§|chapter)\s*\d", re.IGNORECASE)
    offenders = [f"{path}" for path in [*OURS, *RUST] if number.search(text(path))]
    assert offenders == []


def test_make_help_names_every_target() -> None:
    """What is not shown does not exist."""
    makefile = text(Path("Makefile"))
    shown = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    wanted = {"setup", "build", "check", "check-fast", "test", "test-all", "fuzz", "bench"}
    assert wanted | {"demo", "help"} <= shown


def test_the_typed_marker_is_shipped() -> None:
    """Without py.typed nobody's type checker sees ours."""
    assert (ROOT / "understudy/py.typed").exists()


def test_decisions_are_numbered_once() -> None:
    """A decision's number must mean one thing."""
    numbers = [path.name.split("-")[0] for path in files("docs/decisions", ".md")]
    assert sorted(numbers) == [f"{n:04}" for n in range(1, len(numbers) + 1)]
