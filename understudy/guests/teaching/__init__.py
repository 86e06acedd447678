"""The teaching kernel: a small Unix, 32- and 64-bit, built native or paravirtual of one source.

Its sources are beside this file (common/kernel.h says what it is);
`python -m tools.teaching_kernel` builds it, and a test builds it again and compares.  Source: ours.
Invariant: what differs between the two kinds is in native/ and pv/ alone.
"""

from pathlib import Path
from typing import Final, NamedTuple

ROOM: Final = Path(__file__).parent


class Kernel(NamedTuple):
    """One that is built: `kind` is "native" or "pv"."""

    kind: str
    bits: int

    @property
    def path(self) -> Path:
        """Where its ELF file lies."""
        return ROOM / f"{self.kind}-{self.bits}.elf"

    @property
    def description(self) -> str:
        """A line for people."""
        return f"built in: a small {self.bits}-bit Unix for students, {WORDS[self.kind]}"


WORDS: Final = {"native": "with a shell", "pv": "paravirtual"}
GUESTS: Final = {
    "teaching": Kernel("native", 64), "teaching-32": Kernel("native", 32),
    "teaching-pv": Kernel("pv", 64), "teaching-pv-32": Kernel("pv", 32),
}  # fmt: skip
"""By the name that people say."""
