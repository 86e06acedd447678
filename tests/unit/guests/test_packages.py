"""Packages for a guest, against a package client of a few lines."""

import io
import stat
import tarfile
from pathlib import Path

import pytest

from tests.unit.guests.test_debian import package, put_client
from tests.unit.guests.test_initramfs import unpack
from understudy.guests import GuestError, deb, packages
from understudy.guests.cache import Cache
from understudy.guests.initramfs import Node
from understudy.linux import VM

APT = """\
#!/bin/sh
echo "$0 $*" >>"$FAKE/log"
shift 3
[ "$1" = -o ] && shift 2
case $1 in
indextargets) echo "amd64|mirror:/debian/|bookworm|main|/none:1" ;;
pkgnames) printf 'tool\\ntool-extra\\n' | grep "^$2" ;;
install)
    [ -f "$FAKE/fail" ] && { cat "$FAKE/fail" >&2; exit 100; }
    cp "$FAKE"/*.deb "${6#*=}" ;;
esac
"""
LOADER = "usr/lib64/ld-linux-x86-64.so.2"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_client(monkeypatch, tmp_path, APT)
    tool = {"usr/bin/tool": b"a tool", "usr/share/doc/tool/copyright": b"words"}
    (tmp_path / "tool_1%3a2-3_amd64.deb").write_bytes(package(tool))
    (tmp_path / "libneeded_4_amd64.deb").write_bytes(package({LOADER: b"a loader"}))
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_package_comes_with_what_it_needs_and_once(fake: Path, cache: Cache) -> None:
    ramdisk = fake / "ramdisk"
    ramdisk.write_bytes(b"busybox's")
    archive = packages.with_packages(ramdisk, ["tool"], cache=cache).read_bytes()
    assert archive.startswith(b"busybox's")
    files = unpack(archive.removeprefix(b"busybox's"))
    assert files["usr/bin/tool"].data == b"a tool"
    assert files[LOADER].data == b"a loader"
    loader = files["lib64/ld-linux-x86-64.so.2"]
    assert (loader.mode, loader.data) == (stat.S_IFLNK | 0o777, f"/{LOADER}".encode())
    assert not any("share/doc" in name for name in files)
    order = list(files)
    assert order.index("usr") < order.index("usr/bin") < order.index("usr/bin/tool")
    recorded = cache.manifest("package-tool")
    assert (recorded["version"], recorded["needs"]) == ("1:2-3", "libneeded 4, tool 1:2-3")
    before = (fake / "log").read_bytes()
    assert packages.with_packages(ramdisk, ["tool"], cache=cache).read_bytes() == archive
    assert (fake / "log").read_bytes() == before


def test_what_cannot_be_had_is_named(fake: Path, cache: Cache) -> None:
    with pytest.raises(GuestError, match=r"\(bookworm\) have no package too for amd64"):
        packages.tree("too", cache=cache)
    for name in ("", "Tool", "../tool", "-o"):
        with pytest.raises(GuestError, match="is no name of a Debian package"):
            packages.tree(name, cache=cache)
    (fake / "fail").write_text("E: Failed to fetch it  Could not connect")
    with pytest.raises(GuestError, match="package sources cannot be reached"):
        packages.tree("tool", cache=cache)
    assert not cache.has("package-tool")


def test_packages_need_a_linux_by_name(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="hello has no file system"):
        VM.linux("hello", packages=["tool"])
    with pytest.raises(GuestError, match="not with a kernel file"):
        VM.linux(tmp_path / "kernel", packages=["tool"])


def deb_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A package whose archive has these members."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    body = tar.getvalue()
    head = f"{'data.tar':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
    return b"!<arch>\n" + head + body


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def test_every_kind_of_file_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "p.deb"
    path.write_bytes(
        deb_of(
            [
                (member("./", tarfile.DIRTYPE, mode=0o755), b""),
                (member("./bin/", tarfile.DIRTYPE, mode=0o755), b""),
                (member("./bin/su", mode=0o4755), b"x"),
                (member("./bin/hard", tarfile.LNKTYPE, "./bin/su"), b""),
                (member("./bin/soft", tarfile.SYMTYPE, "su"), b""),
                (member("./doc/words"), b"words"),
            ]
        )
    )
    assert deb.tree(path, ("doc/",)) == {
        "bin": Node(stat.S_IFDIR | 0o755),
        "bin/su": Node(stat.S_IFREG | 0o4755, b"x"),
        "bin/hard": Node(stat.S_IFREG | 0o4755, b"x"),
        "bin/soft": Node(stat.S_IFLNK | 0o777, b"su"),
    }


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_package_stays_inside_of_the_tree(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.deb"
    path.write_bytes(deb_of([(member(name), b"x")]))
    with pytest.raises(GuestError, match=r"p.deb is damaged: .*lies outside"):
        deb.tree(path)
