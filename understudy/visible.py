"""Text that somebody else has made, such that a terminal shows it and does nothing else.

Source: ECMA-48 for control functions; Unicode, "Bidirectional Character Types" for marks that
reorder what stands around them.
Invariants: line feeds and tabs stay; what is visible already is not changed, so twice is as once.
"""

import re
from typing import Final

_UNSEEN: Final = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with control functions and unseen marks written out.

    >>> visible("\x1b[31mred\x07\n")
    '\\x1b[31mred\\x07\n'
    """
    return _UNSEEN.sub(_written, text)


def _written(found: "re.Match[str]") -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
