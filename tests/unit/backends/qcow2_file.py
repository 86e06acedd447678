"""qcow2 images made and read in plain Python, to hold what the library does against it.

Source: QEMU's docs/interop/qcow2.txt.  Version 3, clusters of 64 KiB, nothing packed or encrypted.
"""

import struct
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
COPIED = 1 << 63
OFFSET = 0x00FF_FFFF_FFFF_FE00
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
ENTRIES = CLUSTER // 8


def make(
    path: Path,
    size: int,
    clusters: dict[int, bytes],
    *,
    backing: str = "",
    backing_format: str = "qcow2",
    features: int = 0,
    encryption: int = 0,
    version: int = 3,
) -> None:
    """An image with these clusters, all of them in one L2 table."""
    assert max(clusters, default=0) < ENTRIES
    name = backing.encode()
    extension = b""
    if backing and backing_format:
        kind = backing_format.encode()
        extension = struct.pack(">II", 0xE279_2ACA, len(kind)) + kind + bytes(-len(kind) % 8)
    extension += bytes(8)
    at = HEADER.size + len(extension) if backing else 0
    header = HEADER.pack(
        b"QFI\xfb", version, at, len(name), CLUSTER_BITS, size, encryption, 1, 3 * CLUSTER,
        CLUSTER, 1, 0, 0, features, 0, 0, 4, HEADER.size,
    )  # fmt: skip
    count = 5 + len(clusters)
    l2 = [0] * ENTRIES
    data = b""
    for place, (number, content) in enumerate(sorted(clusters.items())):
        l2[number] = COPIED | (5 + place) * CLUSTER
        data += content.ljust(CLUSTER, b"\0")
    parts = [
        header + extension + name,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(f">{count}H", *[1] * count),
        struct.pack(">Q", COPIED | 4 * CLUSTER),
        struct.pack(f">{ENTRIES}Q", *l2),
    ]
    path.write_bytes(b"".join(part.ljust(CLUSTER, b"\0") for part in parts) + data)


def content(path: Path, below: bytes = b"") -> bytes:
    """What the guest sees, read from the tables; each cluster's count must be what it is used."""
    raw = path.read_bytes()
    fields = HEADER.unpack_from(raw)
    size, l1_size, l1_at, counts_at = fields[5], fields[7], fields[8], fields[9]
    used: dict[int, int] = {0: 1}
    seen = bytearray(below.ljust(size, b"\0")[:size])

    def use(offset: int, length: int = CLUSTER) -> None:
        for cluster in range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1):
            used[cluster] = used.get(cluster, 0) + 1

    use(l1_at, 8 * l1_size)
    use(counts_at, fields[10] * CLUSTER)
    for n, entry in enumerate(struct.unpack_from(f">{l1_size}Q", raw, l1_at)):
        if not entry & OFFSET:
            continue
        use(entry & OFFSET)
        for m, leaf in enumerate(struct.unpack_from(f">{ENTRIES}Q", raw, entry & OFFSET)):
            at, place = leaf & OFFSET, (n * ENTRIES + m) * CLUSTER
            if at:
                use(at)
            if leaf & 1 or at:
                data = bytes(CLUSTER) if leaf & 1 else raw[at : at + CLUSTER].ljust(CLUSTER, b"\0")
                seen[place : place + CLUSTER] = data[: max(0, size - place)]
    table = struct.unpack_from(f">{fields[10] * ENTRIES}Q", raw, counts_at)
    counts: dict[int, int] = {}
    for n, block in enumerate(table):
        if block:
            use(block)
            for m, value in enumerate(struct.unpack_from(f">{CLUSTER // 2}H", raw, block)):
                if value:
                    counts[n * (CLUSTER // 2) + m] = value
    assert counts == used, "the counts of clusters are not what is used"
    return bytes(seen)
