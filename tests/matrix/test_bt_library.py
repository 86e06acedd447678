"""Translations that an earlier run has left on disk: found by what they were made of, or not.

What: the same guest run twice, with what lies between broken in each way that a file can be.
Invariant: whatever is in the file, the guest does what it does in VMX operation.
"""

import hashlib
from inspect import ismodule
from pathlib import Path

import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.test_bt import KINDS, small
from understudy.config import Config
from understudy.execution.bt import Bt, library
from understudy.execution.bt import translate as translate_module
from understudy.execution.bt.layout import Layout
from understudy.execution.bt.library import DIGEST, HEAD, LINK, MAGIC, Library, is_sound, packed
from understudy.execution.bt.translate import translate
from understudy.execution.bt.translations import PLACES_KEPT
from understudy.verdict import StopKind
from understudy.vm import VM

BEGIN = len(MAGIC) + DIGEST


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "understudy" / "translations"


def make(program: str = KINDS, **more: str) -> beside_vmx.Make:
    """Of VMs that keep their translations."""

    def made(execution: str) -> VM:
        vm = small(program, "dbt", "lazy", **more)(execution)
        if execution == "bt":
            guest = beside_vmx.guest_of(vm)
            assert isinstance(guest, Bt)
            guest.keep_translations()
        return vm

    return made


def run(program: str = KINDS) -> dict[str, int]:
    """What was translated; the run is right."""
    with make(program)("bt") as vm, make(program)("vmx") as other:
        assert beside_vmx.together(vm, other, 50, 1000) == StopKind.DEBUG_EXIT
        told: dict[str, int] = dict(vm.counts()["execution"]["translated"])
        return told


def saved(folder: Path) -> Path:
    """The only file."""
    (path,) = folder.iterdir()
    return path


def test_a_second_run_finds_all(folder: Path) -> None:
    """The first finds what it has translated before the guest wrote to its code."""
    first = run()
    before = saved(folder).read_bytes()
    second = run()
    assert first.pop("kept") < second.pop("kept") == first["units"]
    assert second == first
    assert saved(folder).read_bytes() == before


def test_other_code_is_not_found() -> None:
    """An ADD of 0x13 where 0x11 was added: only the unit with that is another."""
    known = run()["units"]
    assert known / 2 < run(KINDS.replace("83 c5 11 ", "83 c5 13 "))["kept"] < known


def digested(key: bytes, body: bytes) -> bytes:
    return MAGIC + key + hashlib.sha256(body).digest() + body


def test_a_file_that_is_damaged_or_foreign_is_not_there(folder: Path) -> None:
    first = run()
    path = saved(folder)
    whole = path.read_bytes()
    body = whole[BEGIN + DIGEST :]
    broken = [whole[:n] for n in (0, 5, BEGIN, BEGIN + 8, len(whole) - 1)]
    places = range(0, len(whole), len(whole) // 40)
    broken += [whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :] for at in places]
    broken.append(digested(bytes(DIGEST), body))
    for raw in broken:
        path.write_bytes(raw)
        assert run() == first
        assert path.read_bytes() == whole


def test_where_nothing_can_be_kept_nothing_is(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder would be")
    assert run() == run()


def record() -> bytes:
    code = translate(
        Layout(0xFFFF << 47, 64), 0x1000, p.assemble(KINDS), p.CODE, is_virtual=True
    )  # fmt: skip
    assert code.links and code.moves
    return packed(code, p.assemble(KINDS))


def test_nothing_outside_the_unit_is_believed() -> None:
    raw = record()
    assert is_sound(raw)
    _, guest, length, starts, _, links, moves = HEAD.unpack_from(raw)
    first = HEAD.size + guest + length
    link = first + 4 * starts
    words = [*range(first, first + 4 * starts, 2), link, link + 2]
    words += range(link + LINK.size * links, len(raw), 2)
    assert len(words) == 2 * starts + 2 + moves
    for at in words:
        assert not is_sound(raw[:at] + b"\xff\xff" + raw[at + 2 :])
    head = list(HEAD.unpack_from(raw))
    for n, value in ((1, 0), (2, 0), (2, library.layout.LARGEST + 1), (3, 0)):
        changed = [*head[:n], value, *head[n + 1 :]]
        assert not is_sound(HEAD.pack(*changed) + raw[HEAD.size :])


def test_a_record_that_is_made_up_is_not_used(folder: Path) -> None:
    """With the right digest: its links lead beyond the unit."""
    run()
    path = saved(folder)
    whole = path.read_bytes()
    body = bytearray(whole[BEGIN + DIGEST :])
    at = 0
    while at < len(body):
        _, guest, length, starts, _, links, moves = HEAD.unpack_from(body, at)
        at += HEAD.size + guest + length + 4 * starts
        for n in range(links):
            body[at + LINK.size * n : at + LINK.size * n + 2] = b"\xf0\xff"
        at += LINK.size * links + 2 * moves
    path.write_bytes(digested(whole[len(MAGIC) : BEGIN], bytes(body)))
    told = run()
    assert told["kept"] < told["units"]


def test_what_is_kept_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "KEPT_BYTES", 500)
    run()
    told = run()
    assert saved(folder).stat().st_size <= BEGIN + DIGEST + 500
    assert 0 < told["kept"] < told["units"]


def test_of_one_address_so_many_are_kept() -> None:
    """A guest that writes its code again and again."""
    where = Layout(0xFFFF << 47, 64)
    shelf = Library(where, is_virtual=True)
    codes = [bytes((0xB0, n)) + b"\xf4" * 16 for n in range(library.VARIANTS_KEPT + 1)]
    for code in codes:
        shelf.note(translate(where, 0x1000, code, p.CODE, is_virtual=True), code)
    found = [shelf.find(p.CODE, code, 0x1000) is not None for code in codes]
    assert found == [True] * library.VARIANTS_KEPT + [False]


def test_of_so_many_places_of_the_window_translations_are_kept(folder: Path) -> None:
    with make()("bt") as vm:
        (vcpu,) = vm.vcpus
        guest = vcpu.guest
        assert isinstance(guest, Bt)
        guest.keep_translations()
        found = set()
        for n in range(PLACES_KEPT + 2):
            guest.cache.layout = guest.cache.layout._replace(base=n << 32)
            found.add(guest._library())
        assert None in found and len(found) == PLACES_KEPT + 1


def test_what_decides_the_translation_is_in_the_key() -> None:
    """All of the project's modules that `translate` imports, but for those that only name types."""
    digested = {module.__name__ for module in library.MODULES}
    imported = {
        value.__module__ if not ismodule(value) else value.__name__
        for value in vars(translate_module).values()
        if ismodule(value) or getattr(value, "__module__", None)
    }
    ours = {name for name in imported if name.startswith("understudy.")}
    assert ours <= digested, ours - digested


def test_a_made_up_unit_of_half_an_instruction(folder: Path) -> None:
    """What is noted of it cannot be made again: the guest ends, and the hypervisor does not."""
    run()
    path = saved(folder)
    whole = path.read_bytes()
    key, made_up = whole[len(MAGIC) : BEGIN], []
    for rip, raw in library.records(whole[BEGIN + DIGEST :]):
        _, guest, length, _, _, _, _ = HEAD.unpack_from(raw)
        code = raw[HEAD.size + guest : HEAD.size + guest + length]
        head = HEAD.pack(rip, 1, length, 1, 0, 0, 0)
        made_up.append(head + raw[HEAD.size : HEAD.size + 1] + code + bytes(4))
    path.write_bytes(digested(key, b"".join(made_up)))
    with make()("bt") as vm:
        assert vm.go(budget=1000).kind != StopKind.BUDGET


def test_two_that_save_keep_what_both_have(folder: Path) -> None:
    where = Layout(0xFFFF << 47, 64)
    one, other = (Library(where, is_virtual=True) for _ in range(2))
    for kept, code in ((one, b"\xf4" * 16), (other, b"\x90" * 16)):
        kept.note(translate(where, 0x1000, code, p.CODE, is_virtual=True), code)
        kept.save()
    third = Library(where, is_virtual=True)
    assert third.find(p.CODE, b"\xf4" * 16, 0x1000) and third.find(p.CODE, b"\x90" * 16, 0x1000)
    assert not Library(where, is_virtual=False).find(p.CODE, b"\xf4" * 16, 0x1000)


def test_the_option() -> None:
    assert Config(keep_translations=True).keep_translations
    assert not Config().keep_translations
