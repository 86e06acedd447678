"""Images of a whole Debian, with a package client of a few lines and a VM that plays a script."""

from pathlib import Path

import pytest

from tests.unit.guests.disks import ext4
from tests.unit.guests.test_debian import BUSYBOX, package, put_client
from tests.unit.whole_debian.test_making import Scripted
from understudy.backends.qcow2 import HEADER_BYTES, backing
from understudy.guests import apt
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.guests.release import RELEASES
from understudy.whole_debian import making
from understudy.whole_debian.image import image

APT = """\
#!/bin/sh
echo "$*" >>"$FAKE/log"
shift 3
[ "$1" = -o ] && shift 2
case $1 in
update) [ -f "$FAKE/fail" ] && { cat "$FAKE/fail" >&2; exit 100; }; exit 0 ;;
indextargets)
    echo "amd64|mirror:/debian/|bookworm|main|$FAKE/debian.sources:1"
    echo "amd64|mirror:/security/|bookworm-security|main|$FAKE/debian.sources:1"
    echo "amd64|mirror:/debian/|bookworm-backports|main|$FAKE/debian.sources:1"
    echo "amd64|other:/tools/|stable|main|$FAKE/other.sources:1" ;;
install)
    for word; do
        case $word in
        --simulate) simulate=yes ;;
        Dir::Cache::archives=*) folder=${word#*=} ;;
        Dir::State::status=*) more=yes ;;
        esac
    done
    set -- base-files_12.4 linux-image-6.1.0-1-cloud-amd64_6.1%3a2-1 linux-image-cloud-amd64_6.1
    [ "$more" ] && set -- tool_1
    [ -f "$FAKE/nothing" ] && [ "$more" ] && exit 0
    for one; do
        version=$(echo "${one#*_}" | sed s/%3a/:/)
        [ "$simulate" ] && echo "Inst ${one%_*} ($version Debian:12/stable [amd64])"
        [ "$simulate" ] || cp "$FAKE/${one%_*}.deb" "$folder/${one}_amd64.deb"
    done
    for word in apt ca-certificates dbus e2fsprogs iproute2 iputils-ping kmod less login nano \\
        libnss-myhostname libpam-systemd netbase procps python3 systemd-resolved systemd-sysv \\
        udev usr-is-merged; do
        [ "$simulate" ] || [ "$more" ] || cp "$FAKE/tool.deb" "$folder/${word}_0_all.deb"
    done ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    folder = tmp_path / "fake"
    put_client(monkeypatch, folder, APT)
    monkeypatch.setattr(apt, "codename", lambda: "bookworm")
    kernel = {
        "boot/vmlinuz-6.1.0-1": b"kernel",
        "lib/modules/6.1.0-1/kernel/fs/ext4/ext4.ko": b"\0depends=\0",
    }
    for name, files in {
        "base-files": {"etc/debian_version": b"12\n"},
        "linux-image-6.1.0-1-cloud-amd64": kernel,
        "linux-image-cloud-amd64": {"usr/share/doc/x": b""},
        "tool": {"usr/bin/tool": b"tool"},
    }.items():
        (folder / f"{name}.deb").write_bytes(package(files))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(tmp_path / "cache")
    with made.lock():
        made.store("busybox-static", {"busybox": BUSYBOX}, {"version": "1"})
    return made


def test_an_image_is_made_once(fake: Path, cache: Cache) -> None:
    vm, steps = Scripted(), list[str]()
    made = image("debian", vm.boot, (), lambda text, share: steps.append(text), cache)
    assert vm.log == [
        "boot", "/second-stage", "open", "spread", "first", "unpack", "close", "off",
        "boot", "/second-stage", "open", "configure", "settle", "close", "off",
    ]  # fmt: skip
    assert made.parent == cache.folder("debian-12") and made.stat().st_mode & 0o222 == 0
    about = cache.manifest("debian-12")
    assert about["version"] == "12.4"
    assert "linux-image-6.1.0-1-cloud-amd64_6.1:2-1_amd64" in about["packages"]
    assert image("debian-12", vm.boot, cache=cache) == made  # another name for it
    assert len(vm.configs) == 2
    assert not list((cache.root / "making").iterdir())
    assert {"Unpacking packages", "Configuring packages", "Packing the image"} <= set(steps)


def test_only_the_releases_own_sources_are_asked(fake: Path, cache: Cache) -> None:
    image("debian-13", Scripted().boot, cache=cache)
    text = (cache.root / "apt-trixie" / "sources.list.d" / apt.ONLY_OURS).read_text()
    assert "Suites: trixie\n" in text and "Suites: trixie-security\n" in text
    assert "bookworm" not in text and "backports" not in text and "other:" not in text
    configuration = (cache.root / "apt-trixie" / "apt.conf").read_text()
    assert 'Dir::Etc::sourcelist "/dev/null"' in configuration


def test_who_is_interrupted_goes_on_where_he_was(fake: Path, cache: Cache) -> None:
    broken = Scripted({"configure": ("dpkg: error: no power", 1)})
    with pytest.raises(GuestError, match="no power"):
        image("debian", broken.boot, cache=cache)
    vm = Scripted()
    image("debian", vm.boot, cache=cache)
    assert vm.log[2:4] == ["open", "configure"]


def test_other_packages_begin_anew(fake: Path, cache: Cache) -> None:
    broken = Scripted({"configure": ("", 1)})
    with pytest.raises(GuestError):
        image("debian", broken.boot, cache=cache)
    (fake / "base-files.deb").write_bytes(package({"etc/debian_version": b"12.1\n"}))
    for old in (cache.root / "making").rglob("*.deb"):
        old.unlink()
    vm = Scripted()
    image("debian", vm.boot, cache=cache)
    assert vm.log[2:4] == ["open", "spread"]


def test_the_same_packages_give_the_same_image(fake: Path, tmp_path: Path, cache: Cache) -> None:
    first = image("debian", Scripted().boot, cache=cache)
    other = Cache(tmp_path / "other")
    with other.lock():
        other.store("busybox-static", {"busybox": BUSYBOX}, {"version": "1"})
    assert image("debian", Scripted().boot, cache=other).name == first.name


@pytest.fixture
def base(tmp_path: Path, cache: Cache) -> Path:
    """A Debian in the cache, as far as it matters here."""
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    raw.write_bytes(ext4(tmp_path, {"var/lib/dpkg/status": b"Package: base-files\n"}))
    making.packed(raw, packed)
    with cache.lock():
        cache.store("debian-12", {"disk-1.qcow2": packed}, {"version": "12"})
    return cache.folder("debian-12") / "disk-1.qcow2"


def test_more_packages_are_an_image_over_the_image(fake: Path, cache: Cache, base: Path) -> None:
    vm, before = Scripted(), base.read_bytes()
    made = image("debian", vm.boot, ["tool", "tool"], cache=cache)
    assert vm.log[2:-2] == ["open", "spread", "unpack", "configure"]
    assert backing(made, made.read_bytes()[:HEADER_BYTES]) == (str(base), "qcow2")
    assert base.read_bytes() == before
    assert image("debian", vm.boot, ["tool"], cache=cache) == made
    assert len(vm.configs) == 1


def test_packages_that_are_there_already(fake: Path, cache: Cache, base: Path) -> None:
    (fake / "nothing").touch()
    vm = Scripted()
    image("debian", vm.boot, ["base-files"], cache=cache)
    assert vm.log == []


def test_what_goes_wrong_is_one_line(
    fake: Path, cache: Cache, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GuestError, match="'Tool' is no name of a Debian package"):
        image("debian", Scripted().boot, ["Tool"], cache=cache)
    monkeypatch.setattr(apt, "codename", lambda: "jammy")
    with pytest.raises(GuestError, match="sources are not Debian's: trixie cannot be had"):
        image("debian-13", Scripted().boot, cache=cache)
    monkeypatch.setattr(apt, "codename", lambda: "bookworm")
    (fake / "fail").write_text("E: Could not resolve 'mirror'\n")
    with pytest.raises(GuestError, match="package sources cannot be reached"):
        image("debian-13", Scripted().boot, cache=cache)


def test_releases_have_names_and_items_of_their_own() -> None:
    assert RELEASES["debian"] is RELEASES["debian-12"]
    items = {release.item: release.codename for release in RELEASES.values()}
    assert items == {"debian-12": "bookworm", "debian-13": "trixie"}
