"""Bare-metal guests: every listing says what its bytes are; the tables are what a walk expects."""

import importlib

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from tests.tree import ROOT
from understudy.lab import bare
from understudy.lab.bare import LAYOUTS, Tables, assemble
from understudy.vm import VM


def _listings() -> dict[str, tuple[int, bare.Listing]]:
    """With the bits of their code: 32, or what the experiment says."""
    out = {"TURN_ON": (32, bare.TURN_ON)}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        module = importlib.import_module(f"experiments.{path.stem}")
        for name, value in vars(module).items():
            is_rows = isinstance(value, tuple) and value and isinstance(value[0], tuple)
            if name.isupper() and is_rows and all(isinstance(cell, str) for cell in value[0]):
                out[f"{path.stem}.{name}"] = getattr(module, "BITS", 32), value
    return out


LISTINGS = _listings()


def test_there_are_listings() -> None:
    assert "walk_references.PROGRAM" in LISTINGS


@pytest.mark.parametrize("name", LISTINGS)
def test_the_bytes_are_what_the_listing_says(name: str) -> None:
    formatter = Formatter(FormatterSyntax.NASM)
    at = 0
    bits, listing = LISTINGS[name]
    for row, text in listing:
        data = bytes.fromhex(row)
        (instruction,) = Decoder(bits, data, ip=at)
        assert instruction.len == len(data)
        said = formatter.format(instruction)
        wanted = text.partition(";")[0].strip()
        if instruction.is_jcc_short_or_near or instruction.is_jmp_short_or_near:
            steps = instruction.near_branch_target - at
            said = f"{said.split()[0]} {steps:+d}"
        assert said == wanted
        at += len(data)


@pytest.mark.parametrize("format", LAYOUTS)
def test_tables_translate_as_the_processor_walks_them(format: str) -> None:
    layout = LAYOUTS[format]
    with VM("16M") as vm:
        tables = Tables(vm.memory, format)
        for n, shift in enumerate(layout.pages):
            gva, gpa = (1 + n << 30) + (5 << shift), 1 << shift
            tables.map(gva, gpa, shift)
            efer = 0x500 if format.startswith("intel64") else 0
            seen = vm.processors[0].walk(gva, tables.root, layout.cr4, efer, vm.pages.eptp)
            guest = [entry for dimension, _, _, entry in seen if dimension == "guest"]
            assert len(guest) == layout.memory_levels - n
            assert guest[-1] & ~0xFFF == gpa


def test_a_format_refuses_pages_that_it_has_not() -> None:
    with VM("16M") as vm, pytest.raises(ValueError, match="ia32 has no pages of 2\\^30"):
        Tables(vm.memory, "ia32").entry(1 << 30, 30)


def test_assemble_is_the_bytes() -> None:
    assert assemble((("90", "nop"), ("0f 22 df", "mov cr3,edi"))) == b"\x90\x0f\x22\xdf"
