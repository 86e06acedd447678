"""What one can choose about a VM's socket to its host.

    --vsock PATH[,cid=N][,name=NAME]

Source: ours; what the path means is Firecracker's docs/vsock.md.
Invariant: a `Vsock` that exists is right in itself; whether the path is free is found out when a VM
is made.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from understudy.slot import Slotted

FORM: Final = "PATH[,cid=N][,name=NAME]"
LEAST_CID, LARGEST_CID = 3, (1 << 32) - 2  # below are the hypervisor, this computer, and nobody


@dataclass(frozen=True)
class Vsock(Slotted):
    """A VM's socket to its host."""

    path: str = ""
    """Of a Unix socket, by which programs of this computer reach the guest; kept as an absolute
    path.  Empty: there is none."""
    cid: int = LEAST_CID
    """The guest's address."""

    def __post_init__(self) -> None:
        is_path = type(self.path) is str and "\0" not in self.path
        self._check(is_path, "the path of a Unix socket, to be made")
        is_cid = type(self.cid) is int and LEAST_CID <= self.cid <= LARGEST_CID
        self._check(is_cid, f"cid= from {LEAST_CID} to {LARGEST_CID}")
        self._check(not self.place_problem, self.place_problem)
        if self.path:
            object.__setattr__(self, "path", str(Path(self.path).absolute()))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line's words; ValueError says what was expected."""
        path, *words = (w.replace("\0", ",") for w in re.sub(",,", "\0", text).split(","))
        options: dict[str, Any] = {}
        for word in words:
            name, is_pair, value = word.partition("=")
            if is_pair and name == "cid" and value.isdecimal() and len(value) < 12:
                options[name] = int(value)
            elif is_pair and name == "name":
                options[name] = value
            else:
                raise ValueError(f"vsock {text!r}: expected {FORM}, not {word!r}")
        if not path:
            raise ValueError(f"vsock {text!r}: expected {FORM}")
        return cls(path, **options)

    def _check(self, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"vsock {self.path!r}: expected {expected}")
