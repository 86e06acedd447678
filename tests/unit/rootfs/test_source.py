"""What is left of layers, folders and archives, and what is refused in one line."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import zstandard

from tests.unit.rootfs.layouts import Files, layer, layout
from understudy.guests.entry import GuestError
from understudy.rootfs.source import about, tree

LOWER: Files = {
    "./": None, "./bin": "usr/bin", "./etc": None, "etc/a": b"old", "etc/gone": b"x",
    "opt": None, "opt/one": b"1", "opt/deep": None, "opt/deep/two": b"2", "usr": None,
    "usr/bin": None, "usr/bin/sh": b"shell", "usr/bin/same": ("hard", "./usr/bin/sh"),
    "was-folder": None, "was-folder/file": b"x",
}  # fmt: skip
UPPER: Files = {
    "etc/a": b"new", "etc/.wh.gone": b"", "opt/.wh..wh..opq": b"", "opt/three": b"3",
    "usr/bin/sh": b"another shell", "was-folder": b"a file now",
}  # fmt: skip
LEFT = {
    "bin": "usr/bin", "etc": None, "etc/a": b"new", "opt": None, "opt/three": b"3", "usr": None,
    "usr/bin": None, "usr/bin/sh": b"another shell", "usr/bin/same": b"shell",
    "was-folder": b"a file now",
}  # fmt: skip


def read(source: Path, tmp_path: Path) -> dict[str, bytes | str | None]:
    """What is in the archive that a source becomes."""
    file = tmp_path / "out.tar"
    with ExitStack() as given:
        tree(source, given, tmp_path).write(file)
    found: dict[str, bytes | str | None] = {}
    with tarfile.open(file) as archive:
        for info in archive:
            assert not info.uname and not info.pax_headers
            data = archive.extractfile(info) if info.isfile() or info.islnk() else None
            found[info.name] = data.read() if data else info.linkname or None
    return found


def refused(source: Path, tmp_path: Path) -> str:
    with pytest.raises(GuestError) as caught, ExitStack() as given:
        found = tree(source, given, tmp_path)
        with about(source):
            found.write(tmp_path / "out.tar")
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    return str(caught.value)


def test_an_upper_layer_replaces_and_takes_away(tmp_path: Path) -> None:
    source = layout(tmp_path / "image", [layer(LOWER), layer(UPPER)])
    assert read(source, tmp_path) == LEFT


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress]
)
def test_an_archive_however_it_is_packed(pack: type[bytes], tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    source.write_bytes(pack(layer(LOWER)))
    found = read(source, tmp_path)
    assert found["etc/a"] == b"old" and found["usr/bin/same"] == b"shell"
    with tarfile.open(tmp_path / "out.tar") as archive:
        same, shell = archive.getmember("usr/bin/same"), archive.getmember("usr/bin/sh")
    assert same.islnk() and same.linkname == "usr/bin/sh"
    assert (shell.uid, shell.gid, shell.mode, shell.mtime) == (5, 6, 0o1755, 1_700_000_000)


def test_a_folder_belongs_to_root(tmp_path: Path) -> None:
    source = tmp_path / "root"
    (source / "etc").mkdir(parents=True)
    (source / "etc" / "a").write_bytes(b"1" * 100_000)
    (source / "etc" / "a").chmod(0o640)
    os.link(source / "etc" / "a", source / "etc" / "b")
    (source / "c").symlink_to("/somewhere/else")
    os.mkfifo(source / "pipe")
    expected = {"etc": None, "etc/a": b"1" * 100_000, "etc/b": b"1" * 100_000,
                "c": "/somewhere/else", "pipe": None}  # fmt: skip
    assert read(source, tmp_path) == expected
    with tarfile.open(tmp_path / "out.tar") as archive:
        file = archive.getmember("etc/a")
        assert (file.uid, file.gid, file.mode) == (0, 0, 0o640)
        assert archive.getmember("etc/b").islnk()
    before = (tmp_path / "out.tar").read_bytes()
    read(source, tmp_path)
    assert (tmp_path / "out.tar").read_bytes() == before


def test_an_index_in_the_index_and_other_processors(tmp_path: Path) -> None:
    other = {"platform": {"os": "linux", "architecture": "arm64"}}
    ours = {"platform": {"os": "linux", "architecture": "amd64"}}
    source = layout(tmp_path / "image", [layer(LOWER)], **ours)
    index = json.loads((source / "index.json").read_text())
    inner = index["manifests"][0]
    index["manifests"] = [inner | other, inner]
    (source / "index.json").write_text(json.dumps(index))
    assert "etc/a" in read(source, tmp_path)
    index["manifests"] = [inner | other]
    (source / "index.json").write_text(json.dumps(index))
    assert "has 0 images for amd64" in refused(source, tmp_path)
    index["manifests"] = [inner, inner]
    (source / "index.json").write_text(json.dumps(index))
    assert "has 2 images for amd64" in refused(source, tmp_path)


def test_what_is_no_root_file_system(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "there is no file in it" in refused(tmp_path / "empty", tmp_path)
    text = tmp_path / "text"
    text.write_text("not an archive at all\n" * 100)
    assert "it is no tar archive, or damaged" in refused(text, tmp_path)
    for pack in (gzip.compress, lzma.compress, bz2.compress, zstandard.ZstdCompressor().compress):
        whole = pack(layer({"a": os.urandom(100_000)}))
        text.write_bytes(whole[: len(whole) // 2])
        assert "damaged" in refused(text, tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"../etc/passwd": b"x"}, "leads out of the file system"),
        ({"a": ("hard", "../../b")}, "leads out of the file system"),
        ({"a": ("hard", "b")}, "a is a link to b, which is no file there"),
        ({"oci-layout": b"{}"}, "unpack it, and say its folder"),
    ],
)
def test_names_that_cannot_be(files: Files, said: str, tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    source.write_bytes(layer(files))
    assert said in refused(source, tmp_path)


def test_a_layout_that_is_not_whole(tmp_path: Path) -> None:
    source = layout(tmp_path / "image", [layer(LOWER)])
    index = json.loads((source / "index.json").read_text())
    name = index["manifests"][0]["digest"].removeprefix("sha256:")
    blob = source / "blobs" / "sha256" / name
    manifest = blob.read_bytes()
    blob.write_bytes(manifest + b" ")
    assert "has other bytes than its name says" in refused(source, tmp_path)
    blob.unlink()
    assert "is not there" in refused(source, tmp_path)
    index["manifests"][0]["digest"] = "sha256:../../../etc/passwd"
    (source / "index.json").write_text(json.dumps(index))
    assert "expected sha256:" in refused(source, tmp_path)
    (source / "index.json").write_text("[" * 100_000)
    assert "its index.json cannot be understood" in refused(source, tmp_path)
    encrypted = layout(tmp_path / "other", [b"x"])
    index = json.loads((encrypted / "index.json").read_text())
    name = index["manifests"][0]["digest"].removeprefix("sha256:")
    text = (encrypted / "blobs" / "sha256" / name).read_text().replace("gzip", "gzip+encrypted")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (encrypted / "blobs" / "sha256" / digest).write_text(text)
    index["manifests"][0]["digest"] = f"sha256:{digest}"
    (encrypted / "index.json").write_text(json.dumps(index))
    assert "expected tar, packed by gzip or zstd" in refused(encrypted, tmp_path)
