"""Finished results on disk: one file for each point, whole or not there.

Source: none.  Invariants: a file appears by a rename, so whatever is killed at whatever moment,
a result is either complete or absent; a result is found again by exactly what was run (measuring
function, parameters, version of the code, version of the guest); nothing here ever deletes.
"""

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.lab.table import Row


@dataclass(frozen=True)
class Key:
    """What was run."""

    measure: str  # module and name of the measuring function
    params: str  # canonical JSON
    version: str  # of the code
    guest: str = ""  # version of the guest that a parameter names

    @classmethod
    def of(cls, measure: str, params: Row, version: str, guest: str = "") -> "Key":
        """A key from parameters, whatever their order."""
        return cls(measure, json.dumps(dict(params), sort_keys=True), version, guest)

    @property
    def digest(self) -> str:
        """A name for a file."""
        text = "\0".join((self.measure, self.params, self.version, self.guest))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Key) -> Path:
        """Where the result of a point is, or would be."""
        return self.folder / key.version / f"{key.digest}.json"

    def get(self, key: Key) -> dict[str, Any] | None:
        """The result {"values", "wall_s", …}, or None; a file that cannot be read is no result."""
        try:
            found = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_it = isinstance(found, dict) and found.get("measure") == key.measure
        return found if is_it and found.get("params") == json.loads(key.params) else None

    def put(self, key: Key, values: Row, wall_s: float) -> None:
        """Keep a result: written beside its place, flushed, renamed into it."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "measure": key.measure,
            "params": json.loads(key.params),
            "version": key.version,
            "guest": key.guest,
            "values": dict(values),
            "wall_s": round(wall_s, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        text = json.dumps(content, indent=1) + "\n"
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
