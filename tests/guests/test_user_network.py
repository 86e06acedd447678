"""A Linux guest on this computer's network through passt, against servers of the test's own.

Source: busybox's udhcpc, wget and httpd; what others can read of the frames' file.
"""

import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.guests.web import serving
from tests.unit.backends.test_tap import in_namespace
from understudy.backends import pcap
from understudy.linux import VM

pytestmark = [
    pytest.mark.real_guest,
    pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here"),
]
BODY = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def port() -> Iterator[int]:
    """A web server on this computer's loopback alone."""
    with serving(BODY) as its:
        yield its


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _frames(file: Path) -> list[bytes]:
    data = file.read_bytes()
    magic, major, _, _, _, _, link = pcap.FILE.unpack_from(data)
    assert (magic, major, link) == (pcap.MAGIC, 2, 1)
    frames, at = [], pcap.FILE.size
    while at < len(data):
        _, ns, size, whole = pcap.PACKET.unpack_from(data, at)
        assert ns < 10**9 and size == whole
        at += pcap.PACKET.size
        frames.append(data[at : at + size])
        at += size
    return frames


@pytest.mark.parametrize("clock", ["wall", "virtual"])
def test_a_guest_fetches_and_serves(port: int, clock: str, tmp_path: Path) -> None:
    fetched("cloud-amd64")
    mine, file = _free_port(), tmp_path / "frames.pcap"
    with VM.linux(
        "cloud-amd64", clock=clock, net=f"user,host-loopback,pcap={file}", publish=f"{mine}:80"
    ) as vm:
        assert " 10.0.2.15/24 " in vm.run("ip addr show dev eth0").output
        came = vm.run(f"wget -qO- http://10.0.2.2:{port}/ | md5sum").output.split()[0]
        assert came == md5(BODY).hexdigest()
        vm.run("mkdir /tmp/w; head -c 3000000 /dev/urandom >/tmp/w/index.html; httpd -h /tmp/w")
        expected = vm.run("md5sum </tmp/w/index.html").output.split()[0]
        got: list[bytes] = []

        def fetch() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{mine}/", timeout=60) as answer:
                got.append(answer.read())

        thread = threading.Thread(target=fetch)
        thread.start()
        vm.run_until(lambda: not thread.is_alive(), "the answer", 60, 60)
        thread.join()
        assert md5(got[0]).hexdigest() == expected
        counts = vm.counts()["net"][0]
        assert counts["refused"] == counts["lost"] == 0
    frames = _frames(file)
    assert sum(map(len, frames)) == counts["sent_bytes"] + counts["received_bytes"]


def test_loopback_is_out_of_reach_unless_asked_for(port: int) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", clock="wall", net="user") as vm:
        answer = vm.run(f"timeout 2 wget -qO- http://10.0.2.2:{port}/ | wc -c").output.split()
        assert answer[0] == "0"


def test_ipv6() -> None:
    fetched("cloud-amd64")
    assert in_namespace("tests.guests.ipv6_in_namespace").endswith("all is well\n")
