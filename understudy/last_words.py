"""How a guest ended, in words: its own reason first, then what helps to find out more.

What: pure functions of how a run ended and of what the guest printed.
Source: for the lines that a kernel prints when it gives up: the kernel's own `panic` and `die`.
Invariants: what goes into an error's line is one line; what the guest printed is made visible.
"""

import re
from typing import Final

from understudy.verdict import Stop, StopKind
from understudy.visible import visible

SHOWN_LINES: Final = 12
LONGEST: Final = 200
LAST_BYTES: Final = 4096

_WORDS: Final = {
    StopKind.POWEROFF: "it powered itself off",
    StopKind.RESET: "it asked for a reset",
    StopKind.TRIPLE_FAULT: "a triple fault, it could not deliver an exception",
    StopKind.STUCK: "halted, and nothing can wake it",
    StopKind.STOPPED: "somebody stopped it",
    StopKind.DEBUG_EXIT: "it asked to end through the debug-exit port",
    StopKind.DISK: "a disk's image cannot be read or written",
    StopKind.ERROR: "understudy cannot go on with it",
}

_REASONS: Final = (
    re.compile(r"(?<!end )Kernel panic - not syncing: .+"),
    re.compile(r"(.+)\n+ *-- System halted"),  # of what unpacks the kernel
)

NOTHING_PRINTED: Final = (
    "the guest printed nothing on its serial port: a Linux prints there with --append console=ttyS0"
)


def stop_in_words(stop: Stop) -> str:
    """How a guest ended, in one line."""
    words = _WORDS.get(stop.kind, str(stop.kind))
    detail = stop.detail.partition("\n")[0]
    return f"{words}: {detail}" if detail and stop.kind is not StopKind.POWEROFF else words


def reason(console: str) -> str | None:
    """The line in which the guest's kernel says why it gave up, if it did."""
    for pattern in _REASONS:
        found = pattern.findall(console)
        if found:
            return visible(str(found[-1]).strip()[:LONGEST])
    return None


def ending(stop: Stop, console: str) -> str:
    """How a guest ended, the kernel's own reason first."""
    words, why = stop_in_words(stop), reason(console)
    return f"{why}; {words}" if why is not None else words


def last_lines(console: str) -> str:
    """The end of what the guest printed, as a paragraph."""
    if not console:
        return NOTHING_PRINTED
    lines = console[-LAST_BYTES:].rstrip().split("\n")
    tail = visible("\n".join(line.rstrip("\r") for line in lines[-SHOWN_LINES:]))
    return f"--- the console's last lines ---\n{tail}"
