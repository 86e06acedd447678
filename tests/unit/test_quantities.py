"""Sizes and times are read strictly."""

import pytest

from understudy.quantities import bytes_in_words, parse_size, parse_span


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256M", 256 << 20),
        ("1G", 1 << 30),
        ("64K", 64 << 10),
        ("2GiB", 2 << 30),
        ("16MB", 16 << 20),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text", ["", "256", "256m", "-1M", "0M", "1.5G", "M", "1 G", " 1G", "1G ", "0x10M", "1GG", "٣M"]
)
def test_refused_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size like 256M"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("2m", 120), ("1.5h", 5400), ("5ms", 0.005)]
)
def test_spans(text: str, value: float) -> None:
    assert parse_span(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "90", "0s", "-1s", "1d", "s", "1 s", "infs"])
def test_refused_spans(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time like 90s"):
        parse_span(text)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KB"), (256 << 20, "256 MB")],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert bytes_in_words(count) == words
