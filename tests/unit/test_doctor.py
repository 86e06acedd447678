"""The doctor's words, on computers of other people's."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tree import ROOT
from understudy.doctor import WINDOW_BYTES, WINDOW_MAPPINGS, Computer, Finding, Level, examine

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
    address_bytes: int = -1,
    mappings: str = "65530",
) -> Computer:
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/sys/vm/max_map_count").write_text(f"{mappings}\n")
    (root / "dev").mkdir()
    cpus = "".join(CPUINFO.format(n=n, f=flags) for n in range(2))
    (root / "proc/cpuinfo").write_text(cpus)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_kb} kB\n")
    if kvm:
        (root / "dev/kvm").touch()
    return Computer(root, which, machine, "Linux", address_bytes)


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


@pytest.mark.parametrize(
    ("address_bytes", "mappings", "words", "advice"),
    [
        (-1, "65530", "addresses and mappings enough", ""),
        (1 << 46, "1048576", "addresses and mappings enough", ""),
        (-1, "", "addresses and mappings enough", ""),  # not to be read
        (1 << 43, "65530", "ulimit -v is 8589934592 KiB: ", "ulimit -v unlimited"),
        (WINDOW_BYTES, "65530", "ulimit -v is ", "ulimit -v unlimited"),
        (-1, "60000", "vm.max_map_count is 60000: ", "sysctl vm.max_map_count=65530"),
    ],
)
def test_windows_need_addresses_and_mappings(
    tmp_path: Path, address_bytes: int, mappings: str, words: str, advice: str
) -> None:
    computer = _computer(tmp_path, address_bytes=address_bytes, mappings=mappings)
    finding = _found(computer)["windows"]
    assert words in finding.words
    assert "\n" not in finding.words + finding.advice
    assert finding.advice.endswith(advice)
    assert finding.level is (Level.LACK if advice else Level.GOOD)


def test_windows_take_what_the_machine_says() -> None:
    text = (ROOT / "silicon/src/mmu/window.rs").read_text()
    found = dict(re.findall(r"const (\w+): u(?:32|64|size) = ([\d_<\s]+);", text))
    shift, guard, before, pages = (
        eval(found[name]) for name in ("ARENA_SHIFT", "ARENA_GUARD", "LOW_BEFORE", "PAGES_OF_ALL")
    )
    assert text.count("[ARENA_GUARD; 2]") == 1
    assert text.count("[LOW_BEFORE, ARENA_GUARD]") == 2
    assert (3 << shift) + 5 * guard + before == WINDOW_BYTES
    assert 2 * pages == WINDOW_MAPPINGS


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
