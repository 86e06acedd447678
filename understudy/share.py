"""What one can choose about a folder of this computer that a guest shares.

    --share FOLDER[:MOUNT][,rw][,server=python|virtiofsd|auto][,name=NAME]

A comma in a folder's name is written twice.  Source: ours; the form is that of Docker's `--volume`.
Invariants: a `Share` that exists is right in itself; whether there is such a folder is found out
when a VM is made.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from understudy.slot import Slotted

SERVERS: Final = ("python", "virtiofsd", "auto")
FORM: Final = f"FOLDER[:MOUNT][,rw][,server={'|'.join(SERVERS)}][,name=NAME]"
LONGEST_MOUNT: Final = 1024
PLACE: Final = "/mnt"
"""Where a folder is in the guest, by its own name, if nothing is said."""


@dataclass(frozen=True)
class Share(Slotted):
    """A folder of this computer as a guest has it."""

    folder: str
    """Kept as an absolute path."""
    mount: str = ""
    """Where it is in the guest; empty: /mnt/ and the folder's name."""
    is_writable: bool = False
    server: str = "python"
    """Who serves it: one of `SERVERS`.  auto: virtiofsd where it can be, else python."""

    def __post_init__(self) -> None:
        self._check(type(self.folder) is str and type(self.mount) is str, "texts")
        self._check(bool(self.folder) and "\0" not in self.folder, "the path of a folder")
        self._check(type(self.is_writable) is bool, "is_writable as True or False")
        self._check(self.server in SERVERS, f"server= one of {', '.join(SERVERS)}")
        self._check(not self.place_problem, self.place_problem)
        folder = str(Path(self.folder).absolute())
        object.__setattr__(self, "folder", folder)
        mount = self.mount or f"{PLACE}/{posixpath.basename(posixpath.normpath(folder)) or 'host'}"
        is_path = mount.startswith("/") and "\0" not in mount and len(mount) <= LONGEST_MOUNT
        mount = f"/{posixpath.normpath(mount).lstrip('/')}" if is_path else ""
        self._check(
            mount not in ("", "/") and ".." not in self.mount.split("/"),
            f"a place in the guest like {PLACE}/data, a path from / on, not {self.mount!r}",
        )
        object.__setattr__(self, "mount", mount)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line's words; ValueError says what was expected."""
        place, *words = (w.replace("\0", ",") for w in re.sub(",,", "\0", text).split(","))
        folder, is_said, mount = place.rpartition(":")
        if not is_said or not mount.startswith("/"):
            folder, mount = place, ""  # the colon is the folder's
        options: dict[str, Any] = {}
        for word in words:
            name, is_pair, value = word.partition("=")
            if word in ("rw", "ro"):
                options["is_writable"] = word == "rw"
            elif is_pair and name in ("name", "server"):
                options[name] = value
            else:
                raise ValueError(
                    f"share {text!r}: expected {FORM}, not {word!r}; "
                    "a comma in a folder's name is written twice"
                )
        return cls(folder, mount, **options)

    def has(self, path: str) -> bool:
        """Whether a path of this computer leads into the folder."""
        return Path(path).resolve().is_relative_to(Path(self.folder).resolve())

    def _check(self, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"share {self.folder!r}: expected {expected}")
