"""How a guest ended, with the kernel's own reason first."""

from understudy.last_words import NOTHING_PRINTED, ending, last_lines, reason
from understudy.verdict import Stop, StopKind

PANIC = """\
[    1.21] Run /init as init process
[    1.22] Kernel panic - not syncing: sysrq triggered crash
[    1.22] CPU: 0 PID: 1 Comm: sh Not tainted 6.1.0
[    1.23]  panic+0x10b/0x2d0
[    1.24] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---
"""


def test_a_panic_is_told_first() -> None:
    words = "Kernel panic - not syncing: sysrq triggered crash"
    assert reason(PANIC) == words
    assert ending(Stop(StopKind.RESET), PANIC) == f"{words}; it asked for a reset"


def test_what_unpacks_the_kernel_gives_up_too() -> None:
    assert reason("Decompressing Linux...\n\nOut of memory\n\n -- System halted") == "Out of memory"


def test_without_a_reason_the_stop_speaks_alone() -> None:
    assert reason("Linux version 6\n# ") is None
    assert ending(Stop(StopKind.STUCK, "halted\nrip 0"), "") == (
        "halted, and nothing can wake it: halted"
    )


def test_a_long_reason_is_cut() -> None:
    assert len(reason("Kernel panic - not syncing: " + "x" * 10_000) or "") == 200


def test_silence_is_a_hint() -> None:
    assert last_lines("") == NOTHING_PRINTED
    assert last_lines("one\ntwo\n").endswith("---\none\ntwo")
