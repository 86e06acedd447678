"""A guest goes on with the features that it has been shown, or not at all.

What: snapshots are restored where the computer has fewer features, or more, than where they were
made.  Source: ours.
Invariant: what a guest has been shown neither vanishes nor grows; the refusal is one line that
names what is missing.
"""

import pytest

from tests.matrix import programs as p
from understudy import assembly
from understudy.image_file import SnapshotError, pack, unpack
from understudy.machine.host import Host
from understudy.silicon import host_features
from understudy.vcpu.cpu_features import FEATURES
from understudy.vm import VM

OF_THE_COMPUTER = {name for one in FEATURES.values() for name in one.host}


def on_computer(monkeypatch: pytest.MonkeyPatch, *lacking: str) -> None:
    """As if this computer had no more than it has, and not these."""
    features = {name: there and name not in lacking for name, there in host_features().items()}
    monkeypatch.setattr(assembly, "host_features", lambda: features)


def shown(vm: VM) -> frozenset[str]:
    return vm.vcpus[0].model.shown


def saved(cpu: str) -> tuple[bytes, frozenset[str]]:
    with VM("16M", cpu=cpu) as vm:
        p.start(vm, p.HELLO)
        vm.go(budget=5)
        return vm.save(), shown(vm)


@pytest.mark.parametrize(
    ("cpu", "lacking", "missing"),
    [
        ("understudy,+avx2", ("avx", "avx2", "fma", "f16c"), {"avx", "avx2"}),
        ("max", ("avx2",), {"avx2"}),
        ("understudy", ("sse42",), {"sse4_2"}),
    ],
)
def test_a_computer_that_lacks_them_refuses_in_one_line(
    cpu: str, lacking: tuple[str, ...], missing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = saved(cpu)
    if not missing <= before:
        pytest.skip(f"this computer has no {missing}")
    on_computer(monkeypatch, *lacking)
    with Host("64M") as host:
        free = host.frames.free_count
        with pytest.raises(SnapshotError, match=r"^the snapshot's guest has been shown ") as caught:
            VM.restore(data, host=host)
        assert (host.frames.free_count, host.processors) == (free, [])
    line = str(caught.value)
    named = set(line.partition("shown ")[2].partition(":")[0].split(", "))
    assert missing <= named and "\n" not in line
    assert named <= {name for name in FEATURES if set(FEATURES[name].host) & set(lacking)} | missing


@pytest.mark.parametrize("cpu", ["understudy", "max", "understudy,+avx2,-sse4_2"])
def test_a_computer_that_has_more_shows_no_more(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as poor:
        on_computer(poor, *OF_THE_COMPUTER - {"avx", "avx2", "sse42"})
        try:
            data, before = saved(cpu)
        except ValueError as problem:
            pytest.skip(str(problem))
    with VM.restore(data) as vm:
        assert shown(vm) == before
        with VM.restore(vm.save()) as again:
            assert shown(again) == before
            assert again.go().status == vm.go().status == 42


def test_a_baseline_goes_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    data, before = saved("baseline")
    on_computer(monkeypatch, *OF_THE_COMPUTER)
    with VM.restore(data) as vm:
        assert shown(vm) == before
        assert vm.config.cpu == "baseline"
        assert vm.go().status == 42


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cpu", "baseline", r"^the snapshot's guest has been shown .*: expected a computer and a "
         r"CPU model \(--cpu\)"),
        ("features", ["avx512", "\x1b[2J"], r"shown \\x1b\[2J, avx512: expected"),
        ("features", [], "has not been shown .*, and would be now"),
        ("features", "avx", "expected list"),
    ],
)  # fmt: skip
def test_a_model_that_shows_something_else_is_refused(key: str, value: object, words: str) -> None:
    data, _ = saved("understudy")
    state, pieces = unpack(memoryview(data))
    holder = state["config"] if key == "cpu" else state
    holder[key] = value
    with pytest.raises(SnapshotError, match=words) as caught:
        VM.restore(b"".join(pack(state, pieces)))
    assert "\n" not in str(caught.value)
