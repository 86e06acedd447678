"""Build the teaching kernel from its sources in understudy/guests/teaching/, and put it there.

Source: GCC and binutils; who uses understudy needs neither.  Invariant: the same sources and the
same tools give the same bytes, wherever they lie.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from understudy.guests import teaching

FLAGS: Final = (
    "-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic", "-fno-pie",
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
    "-fno-strict-aliasing", "-mgeneral-regs-only", "-Wno-implicit-fallthrough", "-fno-builtin",
)  # fmt: skip
WIDTHS: Final = {
    64: (("-m64", "-mcmodel=kernel", "-mno-red-zone"), "elf_x86_64", "0xFFFFFFFF80000000"),
    32: (("-m32", "-march=i686"), "elf_i386", "0xC0000000"),
}


def built(kind: str, bits: int) -> bytes:
    """The kernel as an ELF file: `kind` is "native" or "pv"."""
    flags, machine, base = WIDTHS[bits]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for part in ("common", kind, "user"):
            for source in sorted((teaching.ROOM / part).glob("*.[cS]")):
                if source.name == "registers.S":
                    continue
                objects.append(f"{part}-{source.stem}.o")
                extra = ("-O1",) if part == "user" else ()
                _run(folder, "gcc", *FLAGS, *flags, *extra, "-c", "-o", objects[-1], source)
        script = ("-P", "-E", "-x", "c", f"-DBASE={base}", "-DENTRY_POINT=start")
        _run(folder, "gcc", *script, "-o", "kernel.ld", teaching.ROOM / "kernel.ld")
        linking = ("-m", machine, "-T", "kernel.ld", "--build-id=none", "--no-warn-rwx-segments")
        _run(folder, "ld", *linking, "-s", "-z", "max-page-size=4096", "-o", "kernel", *objects)
        return (Path(folder) / "kernel").read_bytes()


def lines(*parts: str) -> int:
    """The lines of source in these folders that are no comment and not empty."""
    sources = [file for part in parts for file in (teaching.ROOM / part).glob("*.[chS]")]
    texts = [re.sub(r"/\*.*?\*/", "", file.read_text("utf-8"), flags=re.S) for file in sources]
    return sum(bool(line.strip()) for text in texts for line in text.splitlines())


def _run(folder: str, *command: object) -> None:
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


if __name__ == "__main__":
    for kernel in teaching.GUESTS.values():
        kernel.path.write_bytes(built(*kernel))
