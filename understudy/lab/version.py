"""Which code ran: a hash of everything that a measured count may depend on.

Source: none.  Invariants: any change of the machine, the hypervisor or the measuring function
gives another version; a change of a claim, a sweep, a check, a figure or the report does not, so
what was measured stays good.
"""

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Parts that show, ask or schedule, and so cannot change what a point counts.
PRESENTATION = ("commands", "cli.py", "doctor.py", "terminal.py", "__main__.py")
LAB_PRESENTATION = (
    "bars", "discover", "experiment", "figure", "linux_checks", "report", "store", "sweep", "table",
    "verdict", "version",
)  # fmt: skip
_SHOWN_ONLY = {"check", "draw", "select"}
_PLANNED_ONLY = "EXPERIMENT"


def _counts(path: Path) -> bool:
    parts = path.relative_to(PACKAGE).parts
    if parts[0] in PRESENTATION or "__pycache__" in parts or path.suffix == ".j2":
        return False
    return not (parts[0] == "lab" and path.stem in LAB_PRESENTATION)


@functools.cache
def of_package() -> str:
    """The hash of understudy itself: its Python, its compiled machine, what guests get from it."""
    digest = hashlib.sha256()
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and _counts(p)]
    for path in sorted(files):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def of_experiment(path: Path) -> str:
    """The hash of an experiment's file, without what shows, checks and plans."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name in _SHOWN_ONLY)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == _PLANNED_ONLY)
    ]
    text = "\n".join(ast.dump(node) for node in kept)
    return hashlib.sha256(text.encode()).hexdigest()


def of_measure(module_file: Path) -> str:
    """The version of a measuring function that is defined in this file."""
    own = "" if module_file.is_relative_to(PACKAGE) else of_experiment(module_file)
    return hashlib.sha256(f"{of_package()} {own}".encode()).hexdigest()[:16]
