"""Sizes and spans of time as people write them.

What: "256M" to bytes, "90s" to seconds, and back to words.  Source: none.
Invariant: on the command line nothing is guessed: a number without a unit, or with an unknown one,
is refused.
"""

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([1-9][0-9]*)([KMGT])(?:i?B)?")
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_RATE = re.compile(r"([0-9]{1,12})([KMG]?)")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def bytes_of(size: int | str) -> int:
    """'256M', '4G', or a number of bytes.  ValueError says what was expected."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?B)?", size.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"size {size!r}: expected a number with K, M, G or T, such as 256M")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_size(text: str) -> int:
    """Bytes of "256M" or "1G" (powers of 1024).

    >>> parse_size("256M")
    268435456
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a size like 256M or 1G, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse_rate(text: str, unit: str) -> int:
    """So many of a unit a second, like "100M" (powers of 1000).

    >>> parse_rate("100M", "bit/s")
    100000000
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"rate={text}: expected {unit}, like 100M")
    return int(match[1]) * _THOUSANDS[match[2]]


def parse_span(text: str) -> float:
    """Seconds of "90s", "2m" or "500ms".

    >>> parse_span("2m")
    120.0
    """
    match = _SPAN.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"expected a time like 90s or 2m, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def bytes_in_words(count: int) -> str:
    """A size as a person would say it: 268435456 is "256 MB"."""
    value = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1024:
            return (
                f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"
            )
        value /= 1024
    return f"{value:.1f} TB"
