"""A whole Debian, from packages to what it is for: a login, apt, a disk that keeps what is written.

Source: what systemd, dpkg and apt in it say themselves.
"""

import functools
import hashlib
import http.server
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.guests.apt import Apt
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.linux import VM, GuestStopped
from understudy.verdict import StopKind

pytestmark = [pytest.mark.real_guest, pytest.mark.slow, pytest.mark.timeout(3600)]
LOGIN = "debian login: "


@pytest.fixture(scope="module", autouse=True)
def image() -> Path:
    """The image, made once, or the reason why it is not to be had."""
    try:
        return VM.whole("debian")
    except GuestError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(f"Debian's packages are not to be had here: {error}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a disk of his own yet, whose cache is the usual one."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "understudy"


def test_a_login_without_anybody_and_nothing_that_failed(home: Path) -> None:
    with VM.linux("debian", snapshot=True, net="none") as vm:
        vm.wait_for_text(LOGIN)
        assert vm.run("systemctl is-system-running --wait").output == "running\n"
        assert vm.run("systemctl --failed --no-legend --plain").output == ""
        vm.send("root\n")
        vm.wait_for_text("root@debian:~# ")
        assert vm.run("dpkg --verify; dpkg --audit").output == ""
        assert vm.run("apt-get check -qq").status == 0
        su = vm.run("stat -c '%U %a' /usr/bin/su; stat -c '%U %G %a' /etc/shadow").output
        assert su.splitlines() == ["root 4755", "root shadow 640"]
        result = vm.run("python3 -c 'import sys, ssl, json; print(sys.version_info.major)'")
        assert result.output == "3\n"
        assert vm.run("cd; pwd; echo $HOME; id -u").output == "/root\n/root\n0\n"
        assert vm.run("cat /etc/machine-id").output != "\n"
        vm.send("poweroff\n")
        with pytest.raises(GuestStopped) as stopped:
            vm.wait_for_text("no more")
        assert stopped.value.stop.kind is StopKind.POWEROFF
    assert not home.exists()  # who forgets all needs no disk


def test_it_shares_a_folder_and_has_a_socket_to_the_host(home: Path, tmp_path: Path) -> None:
    shared, path = tmp_path / "shared", tmp_path / "v"
    shared.mkdir()
    (shared / "a").write_text("content")
    with (
        socket.socket(socket.AF_UNIX) as listener,
        VM.linux(
            "debian", snapshot=True, net="none", folders=f"{shared}:/srv/s,rw", vsock=str(path)
        ) as vm,
    ):
        assert vm.run("cat /srv/s/a; findmnt -no FSTYPE /srv/s").output == "contentvirtiofs\n"
        vm.run("tar c -C / etc | tar x -C /srv/s --no-same-owner").check()
        listed = vm.run("cd /etc && find . -type f -exec sha256sum {} + | sort").output
        for line in listed.splitlines():
            digest, name = line.split("  ", 1)
            assert hashlib.sha256((shared / "etc" / name).read_bytes()).hexdigest() == digest
        listener.bind(f"{path}_5")
        listener.listen()
        say = "s = socket.socket(socket.AF_VSOCK); s.connect((2, 5)); s.sendall(b'hello')"
        vm.run(f'python3 -c "import socket; {say}"').check()
        with listener.accept()[0] as end:
            assert end.recv(100) == b"hello"
        assert vm.run("systemctl --failed --no-legend --plain").output == ""


def test_what_is_written_is_there_after_a_power_off_and_a_reboot(home: Path, image: Path) -> None:
    before = hashlib.sha256(image.read_bytes()).digest()
    with VM.linux("debian", net="none") as vm:
        vm.run("echo one >/root/kept; cat /etc/machine-id >>/root/kept; sync").check()
        vm.power_off()
    with VM.linux("debian", net="none") as vm:
        assert (
            vm.run("head -1 /root/kept; tail -1 /root/kept | cmp - /etc/machine-id").raw == b"one\n"
        )
        boot = vm.run("cat /proc/sys/kernel/random/boot_id").output
        vm.wait_for_text(LOGIN)
        vm.send("root\n")
        vm.wait_for_text("root@debian:~# ")
        vm.send("echo two >>/root/kept; reboot\n")
        vm.go(until=lambda: vm.console_text.count(LOGIN) == 2, wall_seconds=600)
        assert vm.run("cat /proc/sys/kernel/random/boot_id").output != boot
        assert vm.run("tail -1 /root/kept").output == "two\n"
        vm.power_off()
    assert [path.name for path in home.iterdir()] == ["debian-12.qcow2"]
    assert hashlib.sha256(image.read_bytes()).digest() == before


def test_any_disk_that_has_a_boot_loaders_configuration(image: Path, home: Path) -> None:
    with VM.linux(None, disks=[f"{image},overlay"], append="systemd.hostname=mine") as vm:
        assert vm.run("hostname").output == "mine\n"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_what: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[int]:
    """A package source on this computer's loopback, with Debian's own hello: its port."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    cache = Cache()
    apt = Apt(cache.root / "apt-bookworm", "amd64", release="bookworm")
    apt.update(lambda text, share: None)
    package = apt.download("hello", folder, lambda text, share: None)
    data = package.read_bytes()
    version = package.name.split("_")[1]
    index = (
        f"Package: hello\nVersion: {version}\nArchitecture: amd64\nDepends: libc6\n"
        f"Maintainer: nobody <nobody@localhost>\nDescription: a greeting\n"
        f"Filename: {package.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    ).encode()
    (folder / "Packages").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    (folder / "Release").write_text(f"Suite: test\nSHA256:\n {digest} {len(index)} Packages\n")
    handler = functools.partial(_Quiet, directory=os.fspath(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here")
def test_apt_installs_from_a_mirror_on_this_computer(mirror: int, home: Path) -> None:
    with VM.linux("debian", snapshot=True, clock="wall", net="user,host-loopback") as vm:
        source = f"deb [trusted=yes] http://10.0.2.2:{mirror}/ ./"
        vm.run(f"rm -r /etc/apt/sources.list.d; echo '{source}' >/etc/apt/sources.list").check()
        wait = "for n in $(seq 50); do ip route | grep -q ^default && exit; sleep 0.2; done; false"
        vm.run(wait).check()
        vm.run("apt-get update").check()
        vm.run("apt-get install --yes hello").check()
        assert vm.run("hello").output == "Hello, world!\n"
        assert vm.run("dpkg --verify hello").output == ""


def test_more_packages_over_the_same_image(home: Path, image: Path) -> None:
    larger = VM.whole("debian", ["hello"])
    assert larger.stat().st_size < image.stat().st_size // 4
    with VM.linux("debian", packages=["hello"], snapshot=True, net="none") as vm:
        assert vm.run("hello").output == "Hello, world!\n"
        assert vm.run("dpkg --verify; dpkg --audit").output == ""


def test_the_same_packages_give_the_same_bytes(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = VM.whole("debian")
    packages = Cache().manifest("debian-12")["packages"]
    monkeypatch.undo()
    if packages != Cache().manifest("debian-12")["packages"]:
        pytest.skip("the package sources have been renewed since the image was made")
    assert again.name == image.name
    assert again.read_bytes() == image.read_bytes()
