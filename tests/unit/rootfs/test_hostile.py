"""Archives that are made to cost much, or that are damaged."""

import io
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.unit.rootfs.layouts import Files, layer, layout
from understudy.guests.entry import GuestError
from understudy.rootfs import source as sources
from understudy.rootfs import tree as trees
from understudy.rootfs.source import about, tree


def archive(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    """One file, with what its extended header says of it; `__` is a point in a keyword."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        info.pax_headers = {key.replace("__", "."): value for key, value in pax.items()}
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sparse(size: int, parts: str = "0,5") -> bytes:
    """A file of five bytes and of holes."""
    return archive("etc/a", b"12345", GNU__sparse__map=parts, GNU__sparse__size=str(size))


def said(source: Path, tmp_path: Path, is_written: bool = True) -> str:
    """Why it is refused; not `is_written`: before anything is written."""
    with pytest.raises(GuestError) as caught, ExitStack() as given:
        found = tree(source, given, tmp_path)
        if is_written:
            with about(source):
                found.write(tmp_path / "out.tar")
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    return str(caught.value)


def file(tmp_path: Path, data: bytes) -> Path:
    source = tmp_path / "root.tar"
    source.write_bytes(data)
    return source


def test_a_sparse_file_is_as_large_as_it_says(tmp_path: Path) -> None:
    source = file(tmp_path, sparse(20, "3,5"))
    with ExitStack() as given:
        tree(source, given, tmp_path).write(tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as out:
        data = out.extractfile("etc/a")
        assert data and data.read() == bytes(3) + b"12345" + bytes(12)


def test_holes_count_and_layers_count_together(tmp_path: Path) -> None:
    source = file(tmp_path, sparse(1 << 50))
    assert "it unpacks to more than 64 GiB" in said(source, tmp_path, is_written=False)
    source = layout(tmp_path / "image", [sparse(40 << 30), sparse(40 << 30)])
    assert "it unpacks to more than 64 GiB" in said(source, tmp_path, is_written=False)


def test_what_layers_unpack_to_counts_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 1 << 20)
    zeros = layer({"a": b""}) + bytes(600_000)  # behind the end of the archive
    with ExitStack() as given:
        tree(layout(tmp_path / "one", [zeros]), given, tmp_path)
    two = layout(tmp_path / "two", [zeros, zeros])
    assert "it unpacks to more than" in said(two, tmp_path, is_written=False)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (sparse(-5), "etc/a has a size of -5 bytes"),
        (sparse(50_000, "0,50000"), "etc/a: unexpected end of data"),
        (archive("etc/a", uid=str(1 << 90)), "etc/a: overflow in number field"),
        (archive("etc/a", mtime="-1e60"), "etc/a: overflow in number field"),
        (archive("etc/a", mtime="inf"), "damaged"),
        (archive("a/" * 3000 + "b"), "longer than a name may be"),
    ],
)
def test_a_damaged_archive_is_one_line(data: bytes, why: str, tmp_path: Path) -> None:
    assert why in said(file(tmp_path, data), tmp_path)


def test_a_folder_has_no_data(tmp_path: Path) -> None:
    source = file(tmp_path, archive("etc", kind=tarfile.DIRTYPE, size="512") + layer({"b": b"2"}))
    with ExitStack() as given:
        tree(source, given, tmp_path).write(tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as out:
        assert out.getmember("etc").size == 0


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = tmp_path / "root"
    source.mkdir()
    (source / "log").write_bytes(b"123")
    with pytest.raises(GuestError) as caught, ExitStack() as given:
        found = tree(source, given, tmp_path)
        (source / "log").write_bytes(b"")
        with about(source):
            found.write(tmp_path / "out.tar")
    assert str(caught.value) == f"rootfs {source}: log: unexpected end of data"


def names(layers: list[Files], tmp_path: Path) -> list[str]:
    with ExitStack() as given:
        source = layout(tmp_path / "image", [layer(one) for one in layers])
        return sorted(tree(source, given, tmp_path).nodes)


def test_a_file_replaces_a_folder_that_no_layer_names(tmp_path: Path) -> None:
    assert names([{"y/z": b"1", "yz": b"2"}, {"y": b"3"}], tmp_path) == ["y", "yz"]


def test_a_whiteout_takes_a_folder_that_no_layer_names(tmp_path: Path) -> None:
    assert names([{"y/z/a": b"1", "x": b"2"}, {".wh.y": b""}], tmp_path) == ["x"]


def test_an_opaque_root_leaves_what_is_in_its_layer(tmp_path: Path) -> None:
    layers: list[Files] = [{"y/z": b"1"}, {"a": b"2", ".wh..wh..opq": b""}]
    assert names(layers, tmp_path) == ["a"]


def test_files_below_a_link_to_a_folder_stay(tmp_path: Path) -> None:
    layers: list[Files] = [{"lib": "usr/lib"}, {"lib/a": b"1"}, {"lib": "usr/lib"}]
    assert names(layers, tmp_path) == ["lib", "lib/a"]


@pytest.mark.parametrize("what", [b"a file", "a-link"])
def test_the_later_of_two_in_one_archive_replaces_the_folder(
    what: bytes | str, tmp_path: Path
) -> None:
    """`./y` and `y` are one name."""
    files: Files = {"y": None, "y/z": b"1", "x": b"2", "./y": what}
    assert names([files], tmp_path) == ["x", "y"]
    assert names([{"y/z": b"1", "x": b"2", "y": what}], tmp_path / "implied") == ["x", "y"]


@pytest.mark.parametrize("layers", [[{"y": b"1"}, {"y/z": b"2"}], [{"y": b"1", "y/z": b"2"}]])
def test_nothing_is_below_a_plain_file(layers: list[Files], tmp_path: Path) -> None:
    source = layout(tmp_path / "image", [layer(one) for one in layers])
    assert "y/z is in y, which is no folder" in said(source, tmp_path)


@pytest.mark.parametrize("kind", ["whiteouts", "opaque", "files over folders"])
def test_what_a_layer_takes_away_costs_one_look_at_each_file(kind: str, tmp_path: Path) -> None:
    def lines(count: int) -> int:
        """Lines that run in the tree's module for so many files, and so many that go."""
        lower: Files = {f"{n}{end}": data for n in range(count)
                        for end, data in (("", None), ("/a", b""))}  # fmt: skip
        upper: Files = {"new": b""}
        for n in range(count):
            what = {"whiteouts": f".wh.{n}", "opaque": f"{n}/.wh..wh..opq"}.get(kind, str(n))
            upper[what] = b""
        ran = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal ran
            if frame.f_code.co_filename != trees.__file__:
                return None
            ran += event == "line"
            return trace

        before = sys.gettrace()
        with ExitStack() as given:
            source = layout(tmp_path / str(count), [layer(lower), layer(upper)])
            sys.settrace(trace)
            try:
                tree(source, given, tmp_path)
            finally:
                sys.settrace(before)
        return ran

    assert lines(200) < 2.2 * lines(100)
