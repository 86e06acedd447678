"""What may be given to a run beside a kernel: a ROM, modules, devices; and what such a VM keeps.

What: the command line with right and wrong input, then snapshot, reset and clone of the same VMs.
Source: none.  Invariants: what is wrong is said in one line, with another status than 0; a machine
that goes on from an image says what the one it was made of says.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.test_run import run
from tests.unit.guests.flat_memory import MIB
from tests.unit.guests.kernels import elf32
from tests.unit.guests.test_loader import multiboot_header
from understudy.guests.entry import GuestError
from understudy.linux import VM
from understudy.verdict import StopKind

POWER_OFF_16 = "ba0406 b80034 ef f4"  # mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt
# mov dx, 0x3f8; mov al, 'R'; out dx, al; mov al, 'O'; out dx, al; mov al, 'M'; out dx, al
SAYS_ROM = f"baf803 b052 ee b04f ee b04d ee {POWER_OFF_16}"
# mov esi, [ebx+24]; mov esi, [esi]; mov edx, 0x3f8; each: lodsb; test al, al; jz off; out dx, al;
# jmp each; off: mov edx, 0x604; mov ax, 0x3400; out dx, ax; hlt
SAYS_MODULE = "8b7318 8b36 baf8030000 ac 84c0 7403 ee ebf8 ba04060000 66b80034 66ef f4"
MODULE = b"what the module holds\0"


@pytest.fixture
def rom(tmp_path: Path) -> Path:
    image = bytearray(0x1_0000)
    code = bytes.fromhex(SAYS_ROM)
    image[: len(code)] = code
    image[-16:-13] = b"\xe9\x0d\x00"  # jmp, over the end of the segment, to its beginning
    file = tmp_path / "firmware.rom"
    file.write_bytes(image)
    return file


@pytest.fixture
def multiboot(tmp_path: Path) -> tuple[Path, Path]:
    """A kernel that says what its first module holds, and a module."""
    kernel, module = tmp_path / "kernel.elf", tmp_path / "module"
    code = multiboot_header(3).ljust(0x20, b"\0") + bytes.fromhex(SAYS_MODULE)
    kernel.write_bytes(elf32(MIB + 0x20, MIB, code))
    module.write_bytes(MODULE)
    return kernel, module


def test_a_rom_is_started_at_its_reset_vector(rom: Path) -> None:
    done = run("--firmware", str(rom), "-m", "16M")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ROM", b"")


@pytest.mark.parametrize("line", ["", ",", ",a line, of two"])
def test_a_module_may_have_a_command_line(multiboot: tuple[Path, Path], line: str) -> None:
    kernel, module = multiboot
    done = run("--kernel", str(kernel), "--module", f"{module}{line}", "-m", "16M")
    assert (done.returncode, done.stdout, done.stderr) == (0, MODULE[:-1], b"")


def test_a_device_is_there(tmp_path: Path, rom: Path) -> None:
    # mov al, 0x5a; out 0xe0, al; mov al, 0; in al, 0xe0; mov dx, 0x3f8; out dx, al
    code = bytes.fromhex(f"b05a e6e0 b000 e4e0 baf803 ee {POWER_OFF_16}")
    rom.write_bytes(code.ljust(0xFFF0, b"\0") + b"\xe9\x0d\x00".ljust(16, b"\0"))
    assert run("--firmware", str(rom), "-m", "16M").stdout == b"\xff"
    assert run("--firmware", str(rom), "-m", "16M", "--device", "testdev").stdout == b"Z"


WRONG: dict[str, tuple[str, ...]] = {
    "there is no such ROM": ("--firmware", "nothing", "no such file"),
    "a ROM that is a folder": ("--firmware", ".", "not a file"),
    "a ROM that is too short": ("--firmware", "short", "whole 64 KiB"),
    "a ROM without a reset vector": ("--firmware", "zero", "no reset vector"),
    "a ROM and a kernel": ("--firmware", "zero", "--kernel", "kernel.elf", "say one of"),
    "a ROM with modules": ("--firmware", "zero", "--module", "module", "--firmware starts"),
    "there is no such module": ("--kernel", "kernel.elf", "--module", "nothing", "no such file"),
    "a module that is empty": ("--kernel", "kernel.elf", "--module", "empty,x", "is empty"),
    "a device that there is not": ("--guest", "hello", "--device", "teapot", "teapot"),
    "a device without a name": ("--guest", "hello", "--device", "", "no part ''"),
    "a device twice": ("--guest", "hello", "--device", "testdev,testdev", "testdev"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, multiboot: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("short", b"x"), ("zero", bytes(0x1_0000)), ("empty", b"")):
        Path(name).write_bytes(data)
    *arguments, words = WRONG[what]
    done = run(*arguments, "-m", "16M")
    text = done.stderr.decode()
    assert done.returncode != 0 and done.stdout == b""
    assert words in text and "Traceback" not in text and "bug in understudy" not in text, text
    assert text.count("\n") == 1, text


@pytest.fixture(params=["rom", "multiboot"])
def machine(
    request: pytest.FixtureRequest, rom: Path, multiboot: tuple[Path, Path]
) -> Iterator[tuple[Callable[[], VM], str]]:
    """How to make the VM, and what it says."""
    kernel, module = multiboot
    if request.param == "rom":
        yield lambda: VM.linux(rom, is_firmware=True, memory="16M"), "ROM"
    else:
        yield (
            lambda: VM.linux(kernel, modules=[(module, "its line")], memory="16M"),
            MODULE[:-1].decode(),
        )


def said(vm: VM) -> str:
    heard = bytearray()
    vm.console.on_output.append(heard.extend)
    assert vm.go(budget=10_000).kind is StopKind.POWEROFF
    return heard.decode()


def test_clones_and_copies_from_a_file_go_on(
    machine: tuple[Callable[[], VM], str], tmp_path: Path
) -> None:
    make, words = machine
    with make() as vm:
        vm.go(budget=4)  # instructions that exit are not in it
        file = tmp_path / "image"
        with vm.snapshot() as image:
            image.write(file)
            (clone,) = image.fork(1)
        with clone, closing(VM.restore(file)) as restored:
            rest = said(vm)
            assert words.endswith(rest) and rest
            assert said(clone) == said(restored) == rest


def test_a_reset_starts_again_with_what_it_was_given(
    machine: tuple[Callable[[], VM], str],
) -> None:
    make, words = machine
    with make() as vm:
        for _ in range(3):
            assert said(vm) == words
            vm.console.on_output.pop()
            vm.reset()
        with vm.snapshot() as image:
            (clone,) = image.fork(1)
        with clone:
            clone.reset()
            assert said(clone) == words


def test_what_cannot_be_a_rom_is_refused_by_the_library_too(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="cannot be read"):
        VM.linux(tmp_path, is_firmware=True)
