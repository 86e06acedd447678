"""A disk from which cloud-init in a guest learns what it is to be: NoCloud.

Source: cloud-init's documentation, "NoCloud" (a file system called cidata with user-data and
meta-data) and "User-data formats".
Invariants: the same user-data give the same disk; other user-data are another instance, so that
cloud-init acts upon them.
"""

import hashlib
from pathlib import Path
from typing import Any, Final

from understudy import plain_file
from understudy.backends import fat
from understudy.backends.locked import ImageError
from understudy.backends.medium import Zeros, check_range

LARGEST: Final = 1 << 20
BEGINNINGS: Final = (
    b"#cloud-config", b"#!", b"#include", b"#cloud-boothook", b"#part-handler", b"## template:",
    b"Content-Type:", b"MIME-Version:", b"\x1f\x8b",
)  # fmt: skip
"""Of user-data; what begins otherwise, cloud-init leaves alone."""


class Seed(Zeros):
    """The disk, which nobody can write."""

    def __init__(self, data: bytes) -> None:
        instance = hashlib.sha256(data).hexdigest()[:16]
        meta = f"instance-id: understudy-{instance}\n".encode()
        self.data = fat.volume("cidata", {"meta-data": meta, "user-data": data})
        super().__init__(len(self.data))

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes."""
        check_range(self, offset, length)
        return self.data[offset : offset + length]

    def save(self) -> dict[str, Any]:
        """What tells whether it is another one."""
        return {"size": self.size, "sha256": hashlib.sha256(self.data).hexdigest()}


def read(file: Path) -> Seed:
    """The disk with these user-data; ImageError says why not."""
    try:
        with plain_file.opened(file) as opened:
            data = opened.read(LARGEST + 1)
    except OSError as error:
        raise ImageError(f"seed {file}: {error.strerror}") from None
    if len(data) > LARGEST:
        raise ImageError(f"seed {file} is larger than {LARGEST >> 20} MiB")
    if not data.startswith(BEGINNINGS):
        raise ImageError(
            f"seed {file} does not begin as user-data of cloud-init do: expected #cloud-config, a "
            "script with #!, or another of its formats"
        )
    return Seed(data)
