"""A new qcow2 image, empty, alone or over another.

Source: QEMU's docs/interop/qcow2.txt, "Header", "Refcount tables", "Header extensions".
Invariants: the same choices give the same bytes; the file is there whole or not at all, and one
that is there already is left alone.
"""

import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from understudy.backends.locked import ImageError
from understudy.backends.qcow2 import BACKING_FORMAT, HEADER, LONGEST_NAME, MAGIC

BITS: Final = 16  # of an offset in a cluster
CLUSTER: Final = 1 << BITS
L2_REACH: Final = CLUSTER // 8 * CLUSTER  # bytes of the disk behind an entry of the L1 table
LARGEST: Final = CLUSTER // 8 * L2_REACH  # with an L1 table of one cluster
REST: Final = struct.Struct(">IQQIIQQQQII")  # of a header of version 3, after crypt_method
LENGTH: Final = HEADER.size + REST.size
COUNTS_AT, COUNT_BLOCK_AT, L1_AT, USED = CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 4


def create(path: Path, size: int, backing: Path | None = None) -> None:
    """An image of `size` bytes; `backing`, a qcow2 image, shows through where nothing is written.

    ImageError says why not.
    """
    if not 0 < size <= LARGEST or size % 512:
        raise ImageError(
            f"{path}: a disk of {size} bytes, expected whole sectors and at most {LARGEST}"
        )
    name = b"" if backing is None else os.fsencode(backing.absolute())
    if len(name) > LONGEST_NAME:
        raise ImageError(f"{path}: the path of its backing file is longer than {LONGEST_NAME}")
    extensions = struct.pack(">II8s", BACKING_FORMAT, 5, b"qcow2") if name else b""
    extensions += bytes(8)
    name_at = LENGTH + len(extensions) if name else 0
    header = HEADER.pack(MAGIC, 3, name_at, len(name), BITS, size, 0)
    entries, order = -(-size // L2_REACH), 4  # counts of 16 bits
    header += REST.pack(entries, L1_AT, COUNTS_AT, 1, 0, 0, 0, 0, 0, order, LENGTH)
    counts = struct.pack(">Q", COUNT_BLOCK_AT).ljust(CLUSTER, b"\0")
    block = struct.pack(f">{USED}H", *[1] * USED).ljust(CLUSTER, b"\0")
    first = (header + extensions + name).ljust(CLUSTER, b"\0")
    _write(path, first + counts + block + bytes(CLUSTER))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            with suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        raise ImageError(f"{path} cannot be made: {error.strerror}") from None
