"""Text of others, made visible."""

import unicodedata

import pytest

from understudy import cli, terminal
from understudy.commands import Refusal
from understudy.last_words import last_lines, reason
from understudy.visible import visible

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egpj.exe\x00\x7f"


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    every = "".join(map(chr, range(0x3000))) + "\ud800\ufeff"
    shown = visible(every)
    left = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "RLI")}
    assert visible(shown) == shown
    assert visible("caf\u00e9 \u4e2d\n\t$") == "caf\u00e9 \u4e2d\n\t$"


def test_what_a_guest_printed_is_visible_in_what_we_say() -> None:
    console = f"one\r\nKernel panic - not syncing: {ESCAPES}\r\ntwo\x1b[1m\n"
    said = reason(console)
    assert said == "Kernel panic - not syncing: " + visible(ESCAPES)
    assert last_lines(console).splitlines() == [
        "--- the console's last lines ---", "one", said, r"two\x1b[1m",
    ]  # fmt: skip


def test_errors_and_notes_are_visible(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise Refusal(f"no {ESCAPES}", detail=f"tail {ESCAPES}\nmore")

    monkeypatch.setattr(cli, "app", refuse)
    assert cli.main([]) == 1
    terminal.note(ESCAPES)
    said = capsys.readouterr().err.replace("\r", "").replace("\n", "")
    assert visible(said) == said
    assert said.count("exe") == 3
