"""The doctor's words, on computers of other people's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.doctor import Computer, Finding, Level, examine

CPUINFO = (
    "processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: Some Xeon\nflags\t\t: fpu {f}\n\n"
)


def _computer(
    root: Path,
    *,
    flags: str = "",
    kvm: bool = False,
    free_kb: int = 8_000_000,
    which: Callable[[str], str | None] = lambda name: f"/usr/bin/{name}",
    machine: str = "x86_64",
) -> Computer:
    (root / "proc").mkdir()
    (root / "dev").mkdir()
    cpus = "".join(CPUINFO.format(n=n, f=flags) for n in range(2))
    (root / "proc/cpuinfo").write_text(cpus)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_kb} kB\n")
    if kvm:
        (root / "dev/kvm").touch()
    return Computer(root, which, machine, "Linux")


def _found(computer: Computer) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examine(computer)}


@pytest.mark.parametrize(
    ("flags", "kvm", "words"),
    [
        ("", True, "nothing stands behind it"),
        ("", False, "none (no vmx or svm flag, no /dev/kvm)"),
        ("vmx", False, "VT-x (vmx), without /dev/kvm"),
        ("svm", True, "AMD-V (svm), /dev/kvm"),
        ("vmxnet", True, "nothing stands behind it"),
    ],
)
def test_hardware_assist(tmp_path: Path, flags: str, kvm: bool, words: str) -> None:
    """The flags decide, not the device: a /dev/kvm without vmx or svm is not believed."""
    assert words in _found(_computer(tmp_path, flags=flags, kvm=kvm))["hardware assist"].words


def test_processor_is_named(tmp_path: Path) -> None:
    words = _found(_computer(tmp_path))["processor"].words
    assert words == "Some Xeon (GenuineIntel), 2 logical processors"


def test_little_memory_has_advice(tmp_path: Path) -> None:
    finding = _found(_computer(tmp_path, free_kb=100_000))["memory"]
    assert finding.level is Level.LACK
    assert "--memory" in finding.advice


def test_missing_tools_have_advice_and_are_no_reason_to_fail(tmp_path: Path) -> None:
    found = _found(_computer(tmp_path, which=lambda _name: None))
    for topic in ("package client", "qemu-system-x86_64", "nasm", "cargo"):
        assert found[topic].level is Level.LACK
        assert found[topic].advice


def test_another_architecture_is_bad(tmp_path: Path) -> None:
    assert _found(_computer(tmp_path, machine="aarch64"))["system"].level is Level.BAD


def test_an_unreadable_proc_is_no_reason_to_raise(tmp_path: Path) -> None:
    found = _found(Computer(tmp_path, lambda _name: None, "x86_64", "Linux"))
    assert found["memory"].level is Level.LACK
    assert "unknown" in found["processor"].words
