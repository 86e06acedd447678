"""The built-in guest: its bytes are the instructions written beside them."""

from iced_x86 import Decoder, Formatter, FormatterSyntax

from tests.unit.guests.flat_memory import MIB, FlatMemory
from understudy.guests import elf, hello, load


def test_bytes_mean_what_is_written_beside_them() -> None:
    decoder = Decoder(64, hello.code(), ip=hello.CODE_GPA)
    formatter = Formatter(FormatterSyntax.MASM)
    for row, text in hello.PROGRAM:
        instruction = decoder.decode()
        assert instruction.len == len(bytes.fromhex(row)), text
        assert formatter.format(instruction) == text
    assert hello.code()[decoder.position :] == hello.MESSAGE + b"\0"
    assert f"{decoder.ip:X}" in hello.PROGRAM[0][1]  # the message's address


def test_it_is_an_elf_file_for_64_bit_mode() -> None:
    image = elf.parse(hello.image())
    assert (image.is_64, image.physical_entry) == (True, hello.CODE_GPA)
    memory = FlatMemory(4 * MIB)
    entry = load(memory, hello.image())
    assert (entry.protocol, entry.registers["rip"]) == ("elf", hello.CODE_GPA)
    assert hello.MESSAGE in memory.read(hello.CODE_GPA, 200)
