"""Fetching, against a package client of a few lines that succeeds or fails as told."""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import pytest

from understudy.guests import GuestError, deb, debian
from understudy.guests.cache import Cache

KERNEL = "linux-image-6.1.0-50-cloud-amd64"
BUSYBOX = b"\x7fELF....\0\0[\0[[\0cat\0mount\0sh\0\0more"

APT = """\
#!/bin/sh
# A package client for tests: $FAKE/fail-VERB makes a verb fail with its text.
echo "$0 $*" >>"$FAKE/log"
conf=$3
[ "$1" = -q ] && shift 3
[ "$1" = -o ] && shift 2
if [ -f "$FAKE/fail-$1" ]; then cat "$FAKE/fail-$1" >&2; exit 100; fi
case $1 in
update) mkdir -p "$FAKE/updated" ;;
indextargets)
    [ -d "$FAKE/updated" ] || exit 0  # apt knows of a list when it has one
    [ -f "$FAKE/amd64-only" ] && grep -q i386 "$conf" && ! grep -q sourceparts "$conf" && exit
    architecture=$(grep "^APT::Architecture " "$conf" | cut -d'"' -f2)
    echo "$architecture|mirror:/debian/|bookworm|main|$FAKE/debian.sources:1" ;;
pkgnames) [ -d "$FAKE/updated" ] && cat "$FAKE/names" | grep "^$2" || true ;;
download) cp "$FAKE/$2.deb" "$2_1%3a2.3-4_amd64.deb" || exit 100 ;;
esac
"""


def package(files: dict[str, bytes], compression: str = "xz") -> bytes:
    """A Debian package, as small as one can be."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    out = b"!<arch>\n"
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd")]
    for name, data in [*members, (f"data.tar.{compression}".rstrip("."), tar.getvalue())]:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def put_client(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let a script be the package client; it finds the folder in $FAKE."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for program in ("apt-get", "apt-cache"):
        (programs / program).write_text(script)
        (programs / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fake"
    put_client(monkeypatch, folder, APT)
    (folder / "names").write_text(f"{KERNEL}\nlinux-image-6.1.0-9-cloud-amd64\nbusybox-static\n")
    (folder / f"{KERNEL}.deb").write_bytes(package({"boot/vmlinuz-6.1.0-50": b"a kernel"}))
    (folder / "debian.sources").write_text("URIs: mirror:/debian/\nSigned-By: /keys/debian.gpg\n")
    (folder / "busybox-static.deb").write_bytes(package({"bin/busybox": BUSYBOX}))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def calls(fake: Path, verb: str) -> int:
    log = fake / "log"
    return sum(f" {verb}" in line for line in log.read_text().splitlines()) if log.exists() else 0


def fetch_kernel(cache: Cache) -> debian.Guest:
    return debian.fetch("cloud-amd64", cache=cache)


def test_fetch_and_cache(fake: Path, cache: Cache) -> None:
    steps: list[str] = []
    guest = debian.fetch("cloud-amd64", lambda text, share: steps.append(text), cache)
    assert isinstance(guest.kernel, Path)
    assert guest.kernel.read_bytes() == b"a kernel"
    assert guest.initrd is not None
    assert guest.initrd.read_bytes().startswith(b"070701")
    assert (guest.version, guest.append) == ("1:2.3-4", "console=ttyS0 panic=-1")
    assert {"Fetching package lists", f"Downloading {KERNEL}", f"Unpacking {KERNEL}"} <= set(steps)
    recorded = json.loads((cache.folder("cloud-amd64") / "manifest.json").read_text())
    assert recorded["files"] == {"kernel": hashlib.sha256(b"a kernel").hexdigest()}
    before = (fake / "log").read_bytes()
    assert fetch_kernel(cache) == guest
    assert (fake / "log").read_bytes() == before  # nothing is fetched twice
    assert {path.name for path in cache.root.glob("items/*")} == {"cloud-amd64", "busybox-static"}
    assert not list(cache.root.rglob(".*"))  # nothing left over


def test_system_is_left_alone(fake: Path, cache: Cache) -> None:
    fetch_kernel(cache)
    for line in (fake / "log").read_text().splitlines():
        assert f"-c {cache.root}/apt/apt.conf" in line
    text = (cache.root / "apt" / "apt.conf").read_text()
    for setting in ("Dir::State", "Dir::State::lists", "Dir::State::status", "Dir::Cache"):
        assert f'{setting} "{cache.root}/apt' in text
    assert "#clear APT::Update;" in text and "#clear DPkg;" in text


def test_list(fake: Path, cache: Cache) -> None:
    rows = {row.name: row for row in debian.listing(cache)}
    assert tuple(rows) == debian.NAMES
    assert rows["hello"].status == "built in"
    assert rows["cloud-amd64"].status == "not fetched"
    fetch_kernel(cache)
    row = next(row for row in debian.listing(cache) if row.name == "cloud-amd64")
    assert (row.status, row.version) == ("fetched", "1:2.3-4")


def test_hello_needs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    guest = debian.fetch("hello", cache=Cache(tmp_path / "unused"))
    assert isinstance(guest.kernel, bytes)
    assert not (tmp_path / "unused").exists()


def refused(cache: Cache, name: str = "cloud-amd64") -> str:
    with pytest.raises(GuestError) as caught:
        debian.fetch(name, cache=cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name(cache: Cache) -> None:
    assert "unknown guest 'plan9': expected one of hello, teaching, " in refused(cache, "plan9")


def test_no_package_client(cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "fetching needs apt-get, the package client of Debian" in refused(cache)


@pytest.mark.parametrize("verb", ["update", "download"])
def test_no_network(fake: Path, cache: Cache, verb: str) -> None:
    said = "E: Failed to fetch mirror:/InRelease  Temporary failure resolving 'mirror'\n"
    (fake / f"fail-{verb}").write_text("W: some warning\n" + said)
    assert "sources cannot be reached" in refused(cache)
    (fake / f"fail-{verb}").unlink()
    assert fetch_kernel(cache).version == "1:2.3-4"  # and it can be tried again


def test_one_list_of_many_fails(fake: Path, cache: Cache) -> None:
    (fake / "updated").mkdir()  # the others came
    said = "E: Failed to fetch mirror:/Packages  Mirror sync in progress?\n"
    (fake / "fail-update").write_text(said)
    assert fetch_kernel(cache).version == "1:2.3-4"
    (fake / "names").write_text("")
    assert "just being renewed: try again" in refused(cache, "amd64")


def test_full_disk(fake: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "fail-download").write_text("E: Write error - write (28: No space left on device)\n")
    assert "no space left for the cache" in refused(cache)
    (fake / "fail-download").unlink()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "no space left for the cache" in refused(cache)
    monkeypatch.undo()
    assert not cache.has("cloud-amd64")


def test_backports_come_from_where_the_release_comes_from(
    fake: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.guests.apt.codename", lambda: "bookworm")
    name = "linux-image-6.12.9+deb12-cloud-amd64"
    (fake / "names").write_text(f"{name}\nbusybox-static\n")
    (fake / f"{name}.deb").write_bytes(package({"boot/vmlinuz-6.12.9": b"newer"}))
    guest = debian.fetch("cloud-amd64-6.12", cache=cache)
    assert isinstance(guest.kernel, Path)
    assert guest.kernel.read_bytes() == b"newer"
    state = cache.root / "apt-backports"
    stanza = (state / "sources.list.d" / "understudy-backports.sources").read_text()
    assert "URIs: mirror:/debian/\nSuites: bookworm-backports\n" in stanza
    assert f'Dir::Etc::sourceparts "{state}/sources.list.d";' in (state / "apt.conf").read_text()


def test_the_32_bit_guests_come_for_their_own_architecture(fake: Path, cache: Cache) -> None:
    """A private state that knows only i386, and a user land of that architecture beside ours."""
    name = "linux-image-6.1.0-50-686-pae"
    (fake / "names").write_text(f"{KERNEL}\n{name}\nlinux-image-6.1.0-50-686\nbusybox-static\n")
    (fake / f"{name}.deb").write_bytes(package({"boot/vmlinuz-6.1.0-50": b"a PAE kernel"}))
    ours = fetch_kernel(cache)
    (fake / "busybox-static.deb").write_bytes(package({"bin/busybox": BUSYBOX + b" of 32 bits"}))
    guest = debian.fetch("686-pae", cache=cache)
    assert isinstance(guest.kernel, Path)
    assert guest.kernel.read_bytes() == b"a PAE kernel"
    assert guest.initrd is not None and ours.initrd is not None
    assert b" of 32 bits" in guest.initrd.read_bytes()
    assert b" of 32 bits" not in ours.initrd.read_bytes()
    text = (cache.root / "apt-i386" / "apt.conf").read_text()
    assert 'APT::Architecture "i386";' in text and 'APT::Architectures { "i386"; };' in text
    assert f'Dir::State "{cache.root}/apt-i386"' in text
    other = (cache.root / "apt" / "apt.conf").read_text()
    assert "i386" not in other
    assert fetch_kernel(cache) == ours
    fetched = {path.name for path in cache.root.glob("items/*")}
    assert fetched == {"cloud-amd64", "686-pae", "busybox-static", "busybox-static-i386"}


def test_sources_that_are_for_the_computers_own_architecture_alone(
    fake: Path, cache: Cache
) -> None:
    """As with `Architectures: amd64` in them: the same sources, asked for i386."""
    name = "linux-image-6.1.0-50-686"
    (fake / "names").write_text(f"{name}\nbusybox-static\n")
    (fake / f"{name}.deb").write_bytes(package({"boot/vmlinuz-6.1.0-50": b"a kernel"}))
    (fake / "amd64-only").touch()
    assert debian.fetch("686", cache=cache).version == "1:2.3-4"
    state = cache.root / "apt-i386"
    assert (state / "sources.list.d" / "understudy.sources").read_text() == (
        "Types: deb\nURIs: mirror:/debian/\nSuites: bookworm\nComponents: main\n"
        "Architectures: i386\nSigned-By: /keys/debian.gpg\n"
    )
    text = (state / "apt.conf").read_text()
    assert f'Dir::Etc::sourceparts "{state}/sources.list.d";' in text
    assert 'Dir::Etc::sourcelist "/dev/null";' in text


def test_an_architecture_that_the_sources_lack_is_named(fake: Path, cache: Cache) -> None:
    assert "have no package linux-image-6.1* for i386: add a Debian suite" in refused(cache, "686")


def test_lists_are_fetched_again_after_a_failed_download(fake: Path, cache: Cache) -> None:
    (fake / "fail-download").write_text("E: Failed to fetch mirror:/a.deb  404  Not Found\n")
    refused(cache)
    refused(cache)
    assert calls(fake, "update") == 2


def test_other_failures(fake: Path, cache: Cache) -> None:
    (fake / "fail-download").write_text("E: Failed to fetch x  Hash Sum mismatch\n")
    assert "the download is damaged" in refused(cache)
    (fake / "fail-download").write_text("E: The moon is full\n")
    assert refused(cache) == f"Downloading {KERNEL}: apt failed (The moon is full)"
    (fake / "fail-download").unlink()
    (fake / f"{KERNEL}.deb").write_bytes(b"!<arch>\nno package")
    assert "is damaged: it has no data.tar" in refused(cache)


def test_release_without_the_kernel(fake: Path, cache: Cache) -> None:
    (fake / "names").write_text("linux-image-5.10.0-1-cloud-amd64\n")
    message = refused(cache)
    assert "package sources (bookworm) have no package linux-image-6.1*" in message


def test_cache_that_cannot_be_written(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "set XDG_CACHE_HOME" in refused(Cache(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("damage", [b"a kernex", b"", None])
def test_damaged_cache(fake: Path, cache: Cache, damage: bytes | None) -> None:
    path = fetch_kernel(cache).kernel
    assert isinstance(path, Path)
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    message = refused(cache)
    assert "the cached cloud-amd64 is damaged" in message
    assert f"remove {cache.folder('cloud-amd64')} and fetch it again" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "files": {"../x": "y"}}', "\xff"])
def test_damaged_manifest(fake: Path, cache: Cache, text: str) -> None:
    fetch_kernel(cache)
    (cache.folder("cloud-amd64") / "manifest.json").write_text(text, encoding="latin-1")
    assert "cannot be understood" in refused(cache)
    row = next(row for row in debian.listing(cache) if row.name == "cloud-amd64")
    assert row.version == "damaged"


def _fetch_in_child(root: Path) -> None:
    assert fetch_kernel(Cache(root)).version == "1:2.3-4"


def test_parallel_fetches_fetch_once(fake: Path, cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_fetch_in_child, args=(cache.root,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert calls(fake, f"download {KERNEL}") == 1


def test_newest_kernel() -> None:
    names = [
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-image-6.1.0-50-cloud-amd64-unsigned",
        "linux-image-6.1.0-50-cloud-amd64",
        "linux-image-6.1.0-50-cloud-amd64-dbg",
        "linux-image-6.1.0-51-rt-amd64",
        "linux-image-6.1.0-49-amd64",
        "linux-image-6.1-cloud-amd64",
        "linux-image-6.12.9+deb12-cloud-amd64",
        "linux-image-6.12.90+deb12.1-cloud-amd64",
        "linux-image-6.12.90+deb12-cloud-amd64",
        "linux-image-6.1.0-50-686",
        "linux-image-6.1.0-49-686-pae",
        "linux-image-6.1.0-51-rt-686-pae",
        "linux-image-6.1.0-51-686-pae-dbg",
    ]
    chosen = {
        name: debian.newest(names, debian.PACKAGES[name].pattern)
        for name in ("cloud-amd64", "amd64", "cloud-amd64-6.12", "686", "686-pae")
    }
    assert chosen == {
        "cloud-amd64": "linux-image-6.1.0-50-cloud-amd64",
        "amd64": "linux-image-6.1.0-49-amd64",
        "cloud-amd64-6.12": "linux-image-6.12.90+deb12.1-cloud-amd64",
        "686": "linux-image-6.1.0-50-686",
        "686-pae": "linux-image-6.1.0-49-686-pae",
    }
    assert (
        debian.newest(
            [*names, "linux-image-6.1.0-51-amd64-unsigned"], debian.PACKAGES["amd64"].pattern
        )
        == "linux-image-6.1.0-51-amd64-unsigned"
    )


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_packages_are_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "p.deb"
    path.write_bytes(package({"a/x-1": b"1", "a/y": b"2"}, compression))
    assert deb.files(path, ["a/x-*", "a/y"]) == {"a/x-*": b"1", "a/y": b"2"}
    with pytest.raises(GuestError, match="has no b"):
        deb.files(path, ["b"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GuestError, match="is damaged"):
        deb.files(path, ["b"])
