"""A file with all frames of a card, for others to read.

Source: draft-ietf-opsawg-pcap, "PCAP Capture File Format", with times in ns.
Invariant: each frame is there whole, with its checksums, in the order in which it passed; a file
that cannot be written any more ends, and the VM goes on.
"""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

from understudy.backends.cable import NetworkError
from understudy.backends.frame import Frame

MAGIC: Final = 0xA1B23C4D  # times in ns
VERSION: Final = 2, 4
LONGEST: Final = 1 << 18
ETHERNET: Final = 1  # LINKTYPE_ETHERNET
FILE: Final = struct.Struct("<IHHiIII")
PACKET: Final = struct.Struct("<IIII")
SECOND: Final = 10**9


class Pcap:
    """Writes what it hears."""

    def __init__(self, file: str, time_ns: Callable[[], int]) -> None:
        """`time_ns`: ns since 1970.  NetworkError if there can be no such file."""
        self.file, self.time_ns = file, time_ns
        self.problem = ""
        try:
            self._file = Path(file).open("wb")  # noqa: SIM115
        except OSError as error:
            raise NetworkError(f"pcap {file}: {error.strerror}: choose another name") from None
        self._write(FILE.pack(MAGIC, *VERSION, 0, 0, LONGEST, ETHERNET))
        self._try(self._file.flush)

    def heard(self, is_out: bool, frame: Frame) -> None:
        """A frame passes."""
        data = frame.whole().data
        seconds, ns = divmod(self.time_ns(), SECOND)
        self._write(PACKET.pack(seconds & 0xFFFF_FFFF, ns, len(data), len(data)) + data)

    def close(self) -> None:
        """No more comes."""
        self._try(self._file.close)

    def _write(self, data: bytes) -> None:
        if not self.problem:
            self._try(lambda: self._file.write(data))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self.problem:
                self.problem = f"pcap {self.file}: {error.strerror}: no frame is written any more"
                warnings.warn(self.problem, RuntimeWarning, stacklevel=1)
