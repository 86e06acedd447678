"""What one can choose about a disk: a file, and how a VM uses it.

    --disk FILE[,ro][,overlay][,format=raw|qcow2|nocloud][,serial=TEXT][,on-error=report|stop]
           [,rate=SPEED][,name=NAME]

A comma in a file's name is written twice.  Source: ours; the form is QEMU's `-drive`.
Invariants: a `Disk` that exists is right in itself; whether there is such a file is found out when
a VM is made.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from understudy.quantities import parse_rate
from understudy.slot import Slotted

FORMATS: Final = ("auto", "raw", "qcow2", "nocloud")
ON_ERROR: Final = ("report", "stop")
SERIAL_BYTES: Final = 20
SLOWEST, FASTEST = 4_000, 10**12  # bytes a second
FORM: Final = (
    "FILE[,ro][,overlay][,format=raw|qcow2|nocloud][,serial=TEXT][,on-error=stop][,rate=SPEED]"
    "[,name=NAME]"
)


@dataclass(frozen=True)
class Disk(Slotted):
    """A disk of a VM."""

    file: str
    """The image; kept as an absolute path."""
    is_read_only: bool = False
    is_overlay: bool = False
    """What the guest writes is kept beside the image, and forgotten with the VM."""
    format: str = "auto"
    """auto: qcow2 if it is called so, else raw, but then it may not begin as other formats do.
    nocloud: the file is user-data for cloud-init, and the disk one from which that takes them."""
    serial: str = ""
    """What the guest can tell the disk by."""
    on_error: str = "report"
    """report: the guest sees an I/O error; stop: the VM stops, and tries again when it goes on."""
    rate: int = 0
    """The most bytes a second, in guest time, read and written together; 0: no limit."""

    def __post_init__(self) -> None:
        for name in ("file", "format", "serial", "on_error"):
            _check(type(getattr(self, name)) is str, self, f"{name} as a text")
        for name in ("is_read_only", "is_overlay"):
            _check(type(getattr(self, name)) is bool, self, f"{name} as True or False")
        _check(bool(self.file) and "\0" not in self.file, self, "the path of a file")
        _check(self.format in FORMATS, self, f"format={' or '.join(FORMATS)}")
        is_rate = type(self.rate) is int and (not self.rate or SLOWEST <= self.rate <= FASTEST)
        _check(is_rate, self, "rate= of 4K to 1000G bytes a second")
        _check(not self.place_problem, self, self.place_problem)
        _check(self.on_error in ON_ERROR, self, f"on-error={' or '.join(ON_ERROR)}")
        is_serial = self.serial.isascii() and self.serial.isprintable()
        _check(
            is_serial and len(self.serial) <= SERIAL_BYTES,
            self,
            f"a serial number of at most {SERIAL_BYTES} characters of ASCII",
        )
        object.__setattr__(self, "file", str(Path(self.file).absolute()))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line's words; ValueError says what was expected."""
        file, *words = (w.replace("\0", ",") for w in re.sub(",,", "\0", text).split(","))
        options: dict[str, Any] = {}
        for word in words:
            name, is_pair, value = word.partition("=")
            if word in ("ro", "overlay"):
                options["is_read_only" if word == "ro" else "is_overlay"] = True
            elif is_pair and name in ("format", "serial", "on-error", "name"):
                options[name.replace("-", "_")] = value
            elif is_pair and name == "rate":
                options[name] = parse_rate(value, "bytes a second")
            else:
                raise ValueError(
                    f"disk {text!r}: expected {FORM}, not {word!r}; "
                    "a comma in a file's name is written twice"
                )
        return cls(file, **options)


def _check(is_right: bool, disk: Disk, expected: str) -> None:
    if not is_right:
        raise ValueError(f"disk {disk.file!r}: expected {expected}")
