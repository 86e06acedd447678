"""The line between the halves: every fact in Rust, every decision in Python.

Source: ARCHITECTURE.md, "Layers".  Each test says in its docstring why the rule exists.
"""

import re
from pathlib import Path

import pytest

from tests.tree import files, imported, parsed, text

PYTHON = list(files("understudy", ".py"))
RUST = list(files("silicon/src", ".rs"))

# Row by row, the lowest first: a module may import from its own row and from the rows above it.
# Every module or package of understudy is in one of them.
ROWS = (
    (
        "_images",
        "_silicon",
        "bell",
        "silicon",
        "arch",
        "clock",
        "closed",
        "interruption",
        "own_class",
        "plain_file",
        "quantities",
        "sessions",
        "visible",
    ),
    (
        "config",
        "disk",
        "nic",
        "lists",
        "plug",
        "share",
        "slot",
        "state",
        "telling",
        "verdict",
        "vsock",
    ),
    ("backends",),
    ("machine",),
    ("overcommit",),
    ("devices", "guests"),
    ("guest",),
    ("instructions", "paging"),
    ("vcpu",),
    ("answers",),
    ("execution",),
    (
        "console",
        "counting",
        "describe",
        "endings",
        "image",
        "image_file",
        "inspection",
        "overcommit",
        "rendezvous",
        "sched",
        "threads",
        "turns",
    ),
    ("interrupts",),
    ("assembly", "outlets", "tenant"),
    ("changing", "plugging", "vm"),
    (
        "agent",
        "last_words",
        "linux",
        "linux_session",
        "control",
        "rootfs",
        "starting",
        "whole_debian",
    ),
    ("host",),
    ("fleet",),
    ("lab",),
    ("terminal", "doctor", "commands"),
    ("cli", "__main__"),
)
_ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
# Which parts may spell the fields and controls of VMX.
# (What the interpreter does not carry out, VMX does: its guest's state rests in a VMCS.)
VMX = (
    Path("understudy/arch"), Path("understudy/execution/vmx"), Path("understudy/nested"),
    Path("understudy/execution/emulate"), Path("understudy/execution/deprivileged"),
    Path("understudy/execution/bt"), Path("understudy/execution/pv"),
)  # fmt: skip


def _row(module: str) -> int | None:
    """The row of an `understudy.…` module; None if it is not ours, or the package's own door."""
    parts = module.split(".")
    if parts[0] != "understudy" or len(parts) < 2 or parts[1] == "__init__":
        return None
    return _ROW_OF.get(parts[1])


def test_every_module_has_a_row() -> None:
    """A new part is put where it belongs when it is made, not where it happens to work."""
    parts = {path.relative_to("understudy").parts[0].removesuffix(".py") for path in PYTHON}
    unnamed = sorted(parts - {"__init__"} - set(_ROW_OF))
    assert unnamed == [], f"name them in ROWS, above all that they import: {unnamed}"
    gone = sorted(set(_ROW_OF) - parts - {"_images", "_silicon"})
    assert gone == [], f"take them out of ROWS, they are no more: {gone}"


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
        own = _row(".".join(path.with_suffix("").parts))
        if own is None:
            continue
        above = {name for name in imported(parsed(path)) if (_row(name) or 0) > own}
        offenders += sorted(f"{path} imports {name}" for name in above)
    assert not offenders, "\n".join(offenders)


def test_vmx_is_spelled_behind_the_port() -> None:
    """Who decides knows a guest's processor, not how one technique of execution keeps it."""
    spelled = re.compile(r"\bVmcs\b|\bvmx_controls\b|\b(?:vmread|vmwrite)\b")
    offenders = [
        f"{path}: {match.group()}"
        for path in PYTHON
        if not any(path.is_relative_to(part) for part in VMX)
        for match in spelled.finditer(text(path))
    ]
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
