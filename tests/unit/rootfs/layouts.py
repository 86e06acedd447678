"""Layers and OCI image layouts for tests."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

Files = dict[str, bytes | str | tuple[str, str] | None]
"""By name: what is in a file; the target of a symbolic link; ("hard", target); None: a folder."""


def layer(files: Files) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, what in files.items():
            info = tarfile.TarInfo(name)
            info.mtime, info.uid, info.gid, info.uname = 1_700_000_000.5, 5, 6, "somebody"
            data = b""
            if what is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, tuple):
                info.type, info.linkname = tarfile.LNKTYPE, what[1]
            elif isinstance(what, str):
                info.type, info.linkname = tarfile.SYMTYPE, what
            else:
                data, info.size, info.mode = what, len(what), 0o1755
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layout(folder: Path, layers: list[bytes], **entry: Any) -> Path:
    """An image layout of one image; `entry` is added to its entry in the index."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "config": put(b"{}", f"{kind}.config.v1+json"),
        "layers": [put(gzip.compress(one), f"{kind}.layer.v1.tar+gzip") for one in layers],
    }
    image = put(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json") | entry
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [image]}))
    return folder
