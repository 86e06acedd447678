"""The teaching kernel: what is in the package is what its sources make, wherever they lie."""

import shutil
import subprocess

import pytest

from tools import teaching_kernel
from understudy.guests import elf, teaching

COMPILER = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"
"""With which the package's were built: another one makes other bytes."""


def _compiler() -> str:
    if shutil.which("gcc") is None:
        return "none"
    told = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    return told.stdout.partition("\n")[0]


@pytest.mark.parametrize("name", teaching.GUESTS)
def test_its_bytes_are_those_of_its_sources(name: str) -> None:
    if (found := _compiler()) != COMPILER:
        pytest.skip(f"built by {COMPILER}, and here is {found}")
    kernel = teaching.GUESTS[name]
    assert teaching_kernel.built(*kernel) == kernel.path.read_bytes()


@pytest.mark.parametrize("name", teaching.GUESTS)
def test_it_is_a_kernel(name: str) -> None:
    kernel = teaching.GUESTS[name]
    image = elf.parse(kernel.path.read_bytes())
    assert image.is_64 == (kernel.bits == 64)
    assert min(segment.paddr for segment in image.loads) == 0x10_0000
