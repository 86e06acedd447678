"""The figures of the heart are of what they say: exits and switches are counted."""

import pytest

from bench import heart


def test_a_turn_with_a_switch_and_one_without() -> None:
    assert heart.turns(1, 1) > 0 and heart.turns(2, 1) > 0 and heart.turns(2, heart.TURNS) > 0


def test_an_exit_alone_and_on_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    heart.exits_on_a_host(2)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].rpartition(", ")[2].strip() for row in rows] == [
        "alone", "1 VM on a host"
    ]  # fmt: skip
    assert all(float(row.split("|")[2]) > 0 for row in rows)
