"""The agent's program: its bytes are those of its source."""

import io
import shutil

import pytest
from elftools.elf.elffile import ELFFile

from tools.agent_program import assembled
from understudy.guests import agent_program


@pytest.mark.skipif(shutil.which("as") is None, reason="there is no assembler (binutils)")
def test_its_bytes_are_those_of_its_source() -> None:
    assert assembled() == agent_program.CODE


def test_it_is_a_program_for_i386() -> None:
    elf = ELFFile(io.BytesIO(agent_program.image()))
    assert (elf["e_machine"], elf["e_type"]) == ("EM_386", "ET_EXEC")
    (segment,) = elf.iter_segments()
    assert elf["e_entry"] == segment["p_vaddr"] + agent_program.HEADERS_BYTES
    assert segment.data()[agent_program.HEADERS_BYTES :] == agent_program.CODE
    assert agent_program.LOADED_GVA + segment["p_filesz"] <= agent_program.DATA_GVA
