"""Assemble understudy/guests/agent.s and put its bytes into agent_program.py, beside it.

Source: GNU as and ld (binutils), which come with the C linker that `make setup` needs; who uses
understudy needs neither.  Invariant: the same source gives the same bytes.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from understudy.guests import agent_program

ROOM = Path(agent_program.__file__).parent
ROW_BYTES = 32


def assembled() -> bytes:
    """The program's bytes, from its source."""
    with tempfile.TemporaryDirectory() as folder:
        made, linked = Path(folder) / "agent.o", Path(folder) / "agent"
        subprocess.run(["as", "--32", "-o", made, ROOM / "agent.s"], check=True)
        subprocess.run(
            ["ld", "-m", "elf_i386", f"-Ttext={agent_program.CODE_GVA:#x}",
             "--oformat=binary", "-o", linked, made],
            check=True,
        )  # fmt: skip
        return linked.read_bytes()


def rows(code: bytes) -> str:
    """The bytes as they stand in the module."""
    lines = [code[at : at + ROW_BYTES].hex() for at in range(0, len(code), ROW_BYTES)]
    return "".join(f"    {line}\n" for line in lines)


if __name__ == "__main__":
    module = ROOM / "agent_program.py"
    text = module.read_text(encoding="utf-8")
    bytes_rows = f'"""\n{rows(assembled())}"""'
    module.write_text(re.sub(r'"""\n( {4}[0-9a-f]+\n)*"""(?=\))', bytes_rows, text), "utf-8")
