"""What the VM reads in which a Debian is made."""

import io
import stat
import tarfile
from pathlib import Path

from understudy.guests import deb
from understudy.guests.initramfs import Node
from understudy.whole_debian import archive

Row = tuple[str, bytes | None, int, int]  # path, content (None: a folder), mode, group


def package(rows: list[Row], links: dict[str, str] | None = None) -> bytes:
    """A package whose files have owners and modes."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as files:
        for name, data, mode, group in rows:
            entry = tarfile.TarInfo(f"./{name}")
            entry.mode, entry.gid, entry.gname, entry.mtime = mode, group, "shadow", 7
            entry.type = tarfile.REGTYPE if data is not None else tarfile.DIRTYPE
            entry.size = len(data or b"")
            files.addfile(entry, io.BytesIO(data or b""))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"./{target}"
            files.addfile(entry)
    out = deb.AR_MAGIC
    for name, body in (("debian-binary", b"2.0\n"), ("data.tar.xz", tar.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(body):<10}`\n".encode()
        out += body + b"\n" * (len(body) & 1)
    return out


def _written(folder: Path, with_base: bool = True) -> Path:
    one, two = folder / "one_1_amd64.deb", folder / "two_1%3a2_all.deb"
    one.write_bytes(
        package(
            [("bin", None, 0o755, 0), ("bin/su", b"su", 0o4755, 0), ("usr", None, 0o755, 0),
             ("usr/bin/tool", b"tool", 0o755, 42), ("var/local", None, 0o2775, 50)],
            {"bin/alias": "bin/su"},
        )
    )  # fmt: skip
    two.write_bytes(package([("etc/two", b"2" * 1000, 0o644, 0)]))
    file = folder / "packages.tar"
    ours = {"etc/hostname": Node(stat.S_IFREG | 0o644, b"debian\n")}
    archive.write(file, [one] if with_base else [], [one, two], ours if with_base else {})
    return file


def test_the_base_lies_as_it_will_in_the_system(tmp_path: Path) -> None:
    file = _written(tmp_path)
    assert file.stat().st_size % 512 == 0
    with tarfile.open(file) as tar:
        found = {one.name: one for one in tar}
        assert [one.name for one in tar][:5] == [
            "usr",
            "usr/bin",
            "usr/lib",
            "usr/lib64",
            "usr/sbin",
        ]
    assert found["bin"].issym() and found["bin"].linkname == "usr/bin"
    assert found["usr/bin/su"].mode == 0o4755
    assert (found["usr/bin/alias"].islnk(), found["usr/bin/alias"].linkname) == (True, "usr/bin/su")
    tool, local = found["usr/bin/tool"], found["var/local"]
    assert (tool.gid, tool.gname, tool.mtime) == (42, "", 7)  # numbers, whatever they are called
    assert (local.isdir(), local.mode, local.gid) == (True, 0o2775, 50)
    assert (found["etc/hostname"].uid, found["etc/hostname"].mtime) == (0, 0)
    assert not [name for name in found if name.startswith(("bin/", "./"))]


def test_packages_are_there_and_not_compressed(tmp_path: Path) -> None:
    with tarfile.open(_written(tmp_path)) as tar:
        member = tar.extractfile(f"{archive.PACKAGES}/two_1%3a2_all.deb")
        assert member is not None
        data = member.read()
    assert b"data.tar  " in data and b"2" * 1000 in data
    again = tmp_path / "again.deb"
    again.write_bytes(data)
    assert deb.tree(again) == deb.tree(tmp_path / "two_1%3a2_all.deb")


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    first = _written(tmp_path).read_bytes()
    assert _written(tmp_path).read_bytes() == first


def test_more_packages_for_a_system_bring_nothing_else(tmp_path: Path) -> None:
    with tarfile.open(_written(tmp_path, with_base=False)) as tar:
        names = tar.getnames()
    assert names == [
        f"{archive.PACKAGES}/{name}" for name in ("one_1_amd64.deb", "two_1%3a2_all.deb")
    ]
