"""Programs as packages installed them are put where they were, with their libraries."""

import os
from pathlib import Path

import pytest

from bench.installed import copy, install
from bench.rows import ROWS, Group, Row


def row(*paths: str) -> Row:
    return Row("x", Group.BIG, 1, "big/sql.sh", package="coreutils", installed=paths)


@pytest.mark.skipif(not Path("/bin/ls").exists(), reason="no dynamic program to copy")
def test_a_program_comes_with_its_libraries(tmp_path: Path) -> None:
    assert install(row("bin/ls"), tmp_path) == ""
    assert (tmp_path / "bin/ls").read_bytes() == Path("/bin/ls").read_bytes()
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert {"libc.so.6", "ld-linux-x86-64.so.2"} <= set(names)


def test_what_is_missing_is_said_with_its_package(tmp_path: Path) -> None:
    assert install(row("no/such/*"), tmp_path) == "not built: needs coreutils (/no/such/*)"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changed_is_copied_again(tmp_path: Path) -> None:
    source, root = tmp_path / "a", tmp_path / "root"
    source.write_text("old")
    copy(source, root)
    source.write_text("new")
    os.utime(source, (1, 1))
    copy(source, root)
    assert (root / source.relative_to("/")).read_text() == "new"


def test_big_programs_are_six_and_each_names_its_package() -> None:
    rows = [row for row in ROWS if row.group is Group.BIG]
    assert len(rows) >= 5
    assert all(row.installed and row.package and "{size}" in row.script for row in rows)
