"""The line between the halves: every fact in Rust, every decision in Python.

Source: ARCHITECTURE.md, "Layers".  Each test says in its docstring why the rule exists.
"""

import re
from pathlib import Path

import pytest

from tests.tree import files, imported, parsed, text

PYTHON = list(files("understudy", ".py"))
RUST = list(files("silicon/src", ".rs"))

# Layer by layer: a module may import from its own row and from the rows above it.  What is not
# named here is part of the hypervisor.
_HYPERVISOR = ("*",)
LAYERS = (
    (
        "silicon",
        "arch",
        "clock",
        "closed",
        "config",
        "interruption",
        "quantities",
        "sessions",
        "state",
        "verdict",
        "machine",
    ),
    ("devices",),
    ("guests",),
    _HYPERVISOR,
    ("linux", "linux_session", "last_words", "control"),
    ("lab",),
    ("terminal", "doctor", "commands", "cli", "__main__"),
)


def _layer(module: str) -> int | None:
    """The row of LAYERS that an `understudy.…` module belongs to; None if it is not ours."""
    parts = module.split(".")
    if parts[0] != "understudy" or len(parts) < 2 or parts[1] in ("_silicon", "__init__"):
        return None
    rows = (row for row, names in enumerate(LAYERS) if parts[1] in names)
    return next(rows, LAYERS.index(_HYPERVISOR))


def test_silicon_has_one_door() -> None:
    """Only understudy/silicon.py imports the compiled module.

    A newcomer must be able to read in one file everything that Python can ask of the machine.
    """
    offenders = [
        path
        for path in [*PYTHON, *files("tests", ".py"), *files("examples", ".py")]
        if any("_silicon" in name.split(".") for name in imported(parsed(path)))
    ]
    assert offenders == [Path("understudy/silicon.py")]


def test_no_module_reaches_up() -> None:
    """A device must not know the VM, nor a VM the terminal: each part can be read alone."""
    offenders = []
    for path in PYTHON:
        own = _layer(".".join(path.with_suffix("").parts))
        if own is None:
            continue
        for name in imported(parsed(path)):
            theirs = _layer(name)
            if theirs is not None and theirs > own:
                offenders.append(f"{path} imports {name}")
    assert offenders == []


@pytest.mark.skipif(not RUST, reason="no Rust sources in this tree")
class TestRust:
    """What may and may not occur in the machine's sources."""

    def test_pyo3_stays_in_the_bindings(self) -> None:
        """The machine knows no Python: it can be tested, fuzzed and read without it."""
        offenders = [
            path
            for path in RUST
            if re.search(r"\bpyo3\b", text(path))
            and "py" not in path.parts[2:-1]
            and path != Path("silicon/src/lib.rs")
        ]
        assert offenders == []

    def test_no_decisions(self) -> None:
        """Words of hypervisor design mean that a decision has slipped into the machine."""
        words = re.compile(r"\b(shadow[ _-]?pages?|balloon\w*|polic(?:y|ies))\b", re.IGNORECASE)
        offenders = [
            f"{path}: {match.group()}" for path in RUST for match in words.finditer(text(path))
        ]
        assert offenders == []

    def test_unsafe_is_confined(self) -> None:
        """Memory (and its view for Python), generated code and KVM need `unsafe`; nothing else."""
        keyword = re.compile(r"^(?!\s*//).*\bunsafe\b(?!_)", re.MULTILINE)
        names = ("mem.rs", "kvm.rs", "py/memory.rs")
        allowed = [Path("silicon/src") / name for name in names]
        offenders = [
            f"{path}: {match.group().strip()}"
            for path in RUST
            if path not in allowed and "dbt" not in path.parts
            for match in keyword.finditer(text(path))
            if "unsafe_code" not in match.group()
        ]
        assert offenders == []

    def test_each_unsafe_block_says_why_it_is_sound(self) -> None:
        """The reader must be able to check the argument where it is used."""
        offenders = []
        for path in RUST:
            lines = text(path).splitlines()
            for number, line in enumerate(lines):
                code = line.split("//")[0]
                if re.search(r"\bunsafe\s*(\{|impl\b)", code):
                    before = "\n".join(lines[max(0, number - 8) : number + 1])
                    if "SAFETY:" not in before:
                        offenders.append(f"{path}:{number + 1}")
        assert offenders == []
