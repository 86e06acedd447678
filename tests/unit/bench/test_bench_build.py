"""Programs are built once, run natively with equal results, or left out with a reason."""

import shutil
from pathlib import Path

import pytest

from bench import build as builder
from bench.build import build
from bench.markers import Failed
from bench.rows import BOOT, Row, select
from bench.subjects import Native, Subject

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this computer")


def quiet(step: str) -> None:
    """Nobody is told."""


def native(rows: list[Row], directory: Path) -> tuple[Subject, dict[str, str]]:
    built = build(rows, directory, quiet)
    return Native(None, built, directory), built.missing


@needs_gcc
def test_a_loop_runs_natively_and_always_computes_the_same(tmp_path: Path) -> None:
    (fib,) = select("fib")
    place, missing = native([fib], tmp_path)
    assert missing == {}
    first, second = (place.run(fib.command(0.01), 60) for _ in range(2))
    other = place.run(fib.command(0.02), 60)
    assert first.checksum == second.checksum != other.checksum


@needs_gcc
def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    (crc,) = select("crc")
    build([crc, BOOT], tmp_path, quiet)
    program = tmp_path / "root/bench/crc"
    before = program.stat().st_mtime_ns
    build([crc, BOOT], tmp_path, quiet)
    assert program.stat().st_mtime_ns == before


@needs_gcc
def test_a_missing_library_leaves_its_row_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "has_static_library", lambda name, machine: name != "gmp")
    assert build(select("gmp"), tmp_path, quiet).missing == {
        "gmp": "not built: needs libgmp-dev (libgmp.a)"
    }


@needs_gcc
def test_a_program_that_fails_or_hangs_is_reported(tmp_path: Path) -> None:
    (crc,) = select("crc")
    place, _ = native([crc], tmp_path)
    with pytest.raises(Failed, match="within"):
        place.run(["bench/crc", "100000000"], 0.2)
    with pytest.raises(Failed, match="status 1"):
        place.run(["/bin/false"], 60)
