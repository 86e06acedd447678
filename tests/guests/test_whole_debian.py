"""A whole Debian, from packages to what it is for: a login, apt, a disk that keeps what is written.

Source: what systemd, dpkg and apt in it say themselves.
"""

import hashlib
import shutil
import socket
from pathlib import Path

import pytest

from bench.guest.mirror import in_guest, mirror
from understudy.disk import Disk
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


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here")
def test_apt_installs_from_a_mirror_on_this_computer(tmp_path: Path, home: Path) -> None:
    with (
        mirror(tmp_path / "mirror", ["hello"]) as port,
        VM.linux("debian", snapshot=True, clock="wall", net="user,host-loopback") as vm,
    ):
        vm.run(in_guest(port, "10.0.2.2")).check()
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


USER_DATA = """\
#cloud-config
hostname: configured
users:
  - name: alice
    gecos: Alice in the guest
    shell: /bin/bash
    lock_passwd: true
write_files:
  - path: /etc/written/by-cloud-init
    content: "what was asked for\\n"
    permissions: "0640"
runcmd:
  - [sh, -c, "echo $(id -un alice) is there >/root/ran"]
"""


def test_an_image_with_cloud_init_configures_itself(home: Path, tmp_path: Path) -> None:
    seed = tmp_path / "user-data"
    seed.write_text(USER_DATA)
    disk = Disk(str(seed), format="nocloud")
    with VM.linux("debian", packages=["cloud-init"], disks=[disk], net="none") as vm:
        said = vm.run("cloud-init status --wait --long").output
        assert "status: done" in said, said
        assert vm.run("hostname; cat /root/ran").output == "configured\nalice is there\n"
        assert vm.run("getent passwd alice").output.endswith(
            ":Alice in the guest:/home/alice:/bin/bash\n"
        )
        written = vm.run("cat /etc/written/by-cloud-init; stat -c %a /etc/written/by-cloud-init")
        assert written.output == "what was asked for\n640\n"
        vm.run("rm /root/ran; sync").check()
        vm.power_off()
    with VM.linux("debian", packages=["cloud-init"], disks=[disk], net="none") as vm:
        vm.run("cloud-init status --wait").check()
        assert vm.run("test -e /root/ran").status == 1, "the same instance is configured once"
