"""What a program says, and when it was heard."""

import pytest

from bench.markers import Failed, Markers


def test_a_run_is_timed_between_its_markers_however_the_bytes_are_cut() -> None:
    markers = Markers()
    for now, data in enumerate([b"S", b"\n", b"E 00", b"ff\r", b"\nX 0\n"]):
        markers.feed(data, float(now))

    sample = markers.sample()

    assert (sample.seconds, sample.checksum) == (3.0, "00ff")


def test_ready_is_heard_among_other_lines() -> None:
    markers = Markers()
    markers.feed(b"noise\nR\n", 7.0)
    assert markers.ready == 7.0
    assert markers.other == ["noise"]


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        (b"S\nX 139\n", "status 139"),
        (b"lua: no memory\nX 1\n", "lua: no memory"),
        (b"E 12\nX 0\n", "no S"),
        (b"S\nX 0\n", "no E"),
        (b"S\nE 12\n", "status None"),
    ],
)
def test_a_bad_run_says_what_came_instead(heard: bytes, said: str) -> None:
    markers = Markers()
    markers.feed(heard, 1.0)
    with pytest.raises(Failed, match=said):
        markers.sample()
