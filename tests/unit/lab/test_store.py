"""Results on disk: whole or absent, and found again by exactly what was run."""

import json
import os
from pathlib import Path

import pytest

from understudy.lab import version
from understudy.lab.store import Key, Store

KEY = Key.of("m.measure", {"a": 1, "b": "x"}, "v1", "6.1-1")


def test_what_is_put_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, {"n": 24}, 0.5)
    found = store.get(KEY)
    assert found is not None
    assert (found["values"], found["wall_s"]) == ({"n": 24}, 0.5)


@pytest.mark.parametrize(
    "other",
    [
        Key.of("m.other", {"a": 1, "b": "x"}, "v1", "6.1-1"),
        Key.of("m.measure", {"a": 2, "b": "x"}, "v1", "6.1-1"),
        Key.of("m.measure", {"a": 1, "b": "x"}, "v2", "6.1-1"),
        Key.of("m.measure", {"a": 1, "b": "x"}, "v1", "6.1-2"),
    ],
)
def test_another_function_point_code_or_guest_is_another_result(tmp_path: Path, other: Key) -> None:
    store = Store(tmp_path)
    store.put(KEY, {"n": 24}, 0.5)
    assert store.get(other) is None


def test_the_order_of_parameters_does_not_matter() -> None:
    assert Key.of("m.measure", {"b": "x", "a": 1}, "v1", "6.1-1").digest == KEY.digest


@pytest.mark.parametrize(
    "text", ["", '{"measure": "m.measure", "par', "[]", '{"measure": "other"}']
)
def test_a_file_that_is_not_whole_is_no_result(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert store.get(KEY) is None


def test_a_result_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = Store(tmp_path)
    with pytest.raises(OSError, match="No space"):
        store.put(KEY, {"n": 24}, 0.5)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_half_written_result_is_never_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.put(KEY, {"n": 24}, 0.5)
    seen: list[object] = []
    real = os.fsync

    def look(fd: int) -> None:
        seen.append(store.get(KEY))
        real(fd)

    monkeypatch.setattr(os, "fsync", look)
    store.put(KEY, {"n": 25}, 0.5)
    assert [json.dumps(s) for s in seen] != []
    assert all(isinstance(s, dict) and s["values"] == {"n": 24} for s in seen)


def test_the_version_follows_the_measuring_code_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    body = "def measure():\n    return {{'n': {n}}}\n\n\ndef check(table):\n    return {check}\n"

    def of(text: str) -> str:
        path.write_text(text)
        version.of_experiment.cache_clear()
        return version.of_measure(path)

    first = of('"""A claim."""\n' + body.format(n=1, check="[]"))
    assert of('"""Another claim."""\n' + body.format(n=1, check="[1]")) == first
    assert of('"""A claim."""\nEXPERIMENT = 1\n' + body.format(n=1, check="[]")) == first
    assert of('"""A claim."""\n' + body.format(n=2, check="[]")) != first
    version.of_experiment.cache_clear()
