"""The table of rows and the sources on the disk agree."""

import pytest

from bench.build import SHARED, SOURCES
from bench.rows import LOOPS, PROGRAMS, ROWS, Group, select


def test_names_are_unique_and_sources_exist() -> None:
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)
    assert [row.source for row in ROWS if row.source and not (SOURCES / row.source).exists()] == []


def test_every_source_is_a_row() -> None:
    found = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.*")}
    assert found - {file for row in ROWS for file in (row.source, *row.data)} == set(SHARED)


def test_there_are_nineteen_loops_and_a_dozen_kinds_of_programs() -> None:
    assert len(LOOPS) == 19
    assert len(PROGRAMS) >= 12


def test_rows_are_chosen_by_name_and_by_group() -> None:
    chosen = select("boot, crc,os")
    assert {row.name for row in chosen if row.group is not Group.OS} == {"boot", "crc"}
    assert {row.group for row in chosen} == {Group.BOOT, Group.LOOPS, Group.OS}
    assert select("") == list(ROWS)


def test_an_unknown_row_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'spec2017'.*loops"):
        select("crc,spec2017")


def test_the_size_is_scaled_and_never_nothing() -> None:
    (crc,) = select("crc")
    (script,) = select("script")
    assert crc.command(2.0) == ["bench/crc", str(2 * crc.size)]
    assert crc.command(1e-9) == ["bench/crc", "1"]
    assert script.command(1e-9) == ["bin/sh", "bench/script.sh", "1"]
