"""Builds the programs with the computer's gcc, static and without AVX, and the guests' initramfs.

Invariants: a row that cannot be built is left out with the reason, never silently; nothing is
compiled again whose command and sources are the same as before.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.image import archive
from bench.installed import install
from bench.rows import ENVIRONMENT, SOURCES, Row

SHARED = ("bench.h", "harness.c", "os/os.h", "init.c")
GCC = ("gcc", "-O2", "-static", "-s", "-Wall", "-Wextra", f"-I{SOURCES}")


@dataclass
class Built:
    """Where everything is, and why some rows are not there."""

    root: Path  # the guests' /, and natively the programs' working directory
    initramfs: Path  # all of it
    boot_initramfs: Path  # only what it takes to reach the first line of userland
    missing: dict[str, str] = field(default_factory=dict)


def build(rows: list[Row], directory: Path, tell: Callable[[str], None]) -> Built:
    """Builds `rows` and both initramfs below `directory`."""
    if shutil.which("gcc") is None:
        raise RuntimeError("no gcc on this computer: install gcc and libc6-dev")
    root, small = directory / "root", directory / "boot-root"
    built = Built(root, directory / "bench.cpio", directory / "boot.cpio")
    for folder in (root / "bench", root / "bin", root / "tmp", small, directory / "stamps"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "bench/environment").write_text(
        "".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items())
    )
    stamps = directory / "stamps"
    reason = compile_once([*GCC, str(SOURCES / "init.c"), "-o", str(small / "init")], stamps)
    if reason:
        raise RuntimeError(f"the guests' init is {reason}")
    shutil.copy2(small / "init", root / "init")
    busybox = install_busybox(root)
    for row in rows:
        if not row.source:
            continue
        tell(f"building {row.name}")
        if row.script:
            reason = busybox or install(row, root)
            for source in (row.source, *row.data):
                shutil.copy2(SOURCES / source, root / "bench" / Path(source).name)
        else:
            reason = build_program(row, root / "bench" / row.name, stamps)
        if reason:
            built.missing[row.name] = reason
    built.initramfs.write_bytes(archive(root))
    built.boot_initramfs.write_bytes(archive(small))
    return built


def build_program(row: Row, target: Path, stamps: Path) -> str:
    """Compiles one row; the answer is empty, or why it could not be built."""
    machine = [flag for flag in row.flags if flag == "-m32"]
    for library in row.libraries:
        if not has_static_library(library, machine):
            return f"not built: needs {row.package or 'libc6-dev'} (lib{library}.a)"
    command = list(GCC) if machine else [*GCC, "-march=x86-64"]
    command += [*row.flags, str(SOURCES / row.source), str(SOURCES / "harness.c")]
    if row.source.endswith(".cpp"):
        if shutil.which("g++") is None:
            return "not built: needs g++"
        command[0] = "g++"
        command.insert(command.index(str(SOURCES / "harness.c")), "-xc")
    command += ["-xnone", *(f"-l{library}" for library in row.libraries), "-o", str(target)]
    return compile_once(command, stamps)


def has_static_library(name: str, machine: list[str]) -> bool:
    """Whether gcc finds lib`name`.a (it answers with a bare name where it does not)."""
    answer = subprocess.run(
        ["gcc", *machine, f"-print-file-name=lib{name}.a"], capture_output=True, text=True
    )
    return "/" in answer.stdout


def compile_once(command: list[str], stamps: Path) -> str:
    """Runs a compiler unless its target is there already; the answer is empty or the reason."""
    target = Path(command[-1])
    stamp = stamps / target.name
    key = fingerprint(command)
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        return f"not built: {errors[0].strip()}"
    stamp.write_text(key)
    return ""


def fingerprint(command: list[str]) -> str:
    """Changes with the command and with every source that it may read."""
    digest = hashlib.sha256(repr(command).encode())
    own = [Path(word) for word in command if word.endswith((".c", ".cpp"))]
    for path in [*own, *(SOURCES / name for name in SHARED)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install_busybox(root: Path) -> str:
    """Puts the computer's static busybox and a link for each applet into bin."""
    found = shutil.which("busybox")
    if found is None:
        return "not built: needs busybox-static"
    headers = subprocess.run([found, "--list"], capture_output=True, text=True)
    if b"/ld-linux" in Path(found).read_bytes():
        return "not built: needs busybox-static (this busybox is not static)"
    shutil.copy2(found, root / "bin/busybox")
    for applet in headers.stdout.split():
        link = root / "bin" / applet
        if applet != "busybox" and not link.is_symlink():
            link.symlink_to("busybox")
    return ""
