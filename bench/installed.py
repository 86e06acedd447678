"""Programs as this computer's packages installed them, put into the guests' file system.

A program comes with the libraries that its loader names, each at its own path, so that all places
load the same files: natively they are where they always are.
Invariants: nothing is changed on its way; what is missing is said in words.
"""

import re
import shutil
import subprocess
from pathlib import Path

from bench.rows import SOURCES, Row

# What CPython needs before its first line, and what the row imports.
MODULES = "import json, re, sys, zlib, encodings.ascii, encodings.latin_1"
LIST = (
    f"{MODULES}\nfor m in list(sys.modules.values()):\n print(getattr(m, '__file__', None) or '')"
)


def install(row: Row, root: Path) -> str:
    """Puts a row's programs and inputs below `root`; the answer is empty or the reason why not."""
    for pattern in row.installed:
        found = sorted(Path("/").glob(pattern))
        if not found:
            return f"not built: needs {row.package} (/{pattern})"
        copy(found[-1], root)
        libraries = subprocess.run(["ldd", str(found[-1])], capture_output=True, text=True).stdout
        if "not found" in libraries:
            return f"not built: {found[-1]} lacks a library"
        for path in re.findall(r"(/\S+) \(0x", libraries):
            copy(Path(path), root)
    if row.name == "python":
        return modules(root)
    if row.name == "compiler":
        return preprocess(row, root)
    return ""


def copy(path: Path, root: Path) -> None:
    """Copies a file to the same path below `root`."""
    target = root / path.relative_to("/")
    if not target.exists() or target.stat().st_mtime != path.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def modules(root: Path) -> str:
    """CPython's own modules, as far as the row needs them."""
    program = sorted((root / "usr/bin").glob("python3.*"))[-1].relative_to(root)
    done = subprocess.run([f"/{program}", "-ISc", LIST], capture_output=True, text=True)
    if done.returncode != 0:
        return f"not built: /{program} lacks {MODULES}"
    for line in done.stdout.splitlines():
        if line.startswith("/usr/lib"):
            copy(Path(line), root)
    copy(Path(f"/usr/lib/{program.name}/os.py"), root)  # by which it knows its folder
    return ""


def preprocess(row: Row, root: Path) -> str:
    """The compiler's input, with all that it includes."""
    source = SOURCES / row.data[0]
    command = [
        "g++",
        "-E",
        "-P",
        f"-I{SOURCES}",
        str(source),
        "-o",
        str(root / "bench/compiler.ii"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"not built: needs {row.package}" if done.returncode else ""
