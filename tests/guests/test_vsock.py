"""The socket to the host under Debian's own driver, from both ends.

Source: Firecracker's docs/vsock.md for this computer's end; vsock(7) for the guest's.
"""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.guests.test_hotplug import KERNELS, TROUBLE, until, until_gone
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

ECHO = """\
import socket, sys
s = socket.socket(socket.AF_VSOCK); s.bind((socket.VMADDR_CID_ANY, 1234)); s.listen()
while True:
    c, who = s.accept()
    while data := c.recv(65536):
        c.sendall(data)
    c.close()
"""
SENDER = """\
import socket, hashlib, os
s = socket.socket(socket.AF_VSOCK); s.connect((2, 7)); data = os.urandom(3_000_001)
s.sendall(data); s.shutdown(socket.SHUT_WR)
print(hashlib.sha256(data).hexdigest(), s.recv(100).decode())
"""
LONG_S = 120.0


@contextmanager
def with_python(kernel: str, **options: object) -> Iterator[VM]:
    """A guest with Python; it runs in wall time, as who talks with it does."""
    fetched(kernel)
    with VM.linux(kernel, packages=["python3"], **options) as vm:  # type: ignore[arg-type]
        vm.write_file("/echo.py", ECHO)
        vm.write_file("/sender.py", SENDER)
        yield vm


def asked(path: Path, port: int) -> socket.socket:
    """Connected to the path, and the wish is said."""
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(LONG_S)
    end.connect(str(path))
    end.sendall(b"CONNECT %d\n" % port)
    return end


def line_of(end: socket.socket) -> bytes:
    """The answer."""
    line = b""
    while not line.endswith(b"\n") and (one := end.recv(1)):
        line += one
    return line


class Talk(threading.Thread):
    """What a program of this computer does meanwhile."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(daemon=True)
        self.path, self.data, self.answer, self.echo = path, data, b"", b""

    def run(self) -> None:
        with asked(self.path, 1234) as end:
            self.answer = line_of(end)
            sender = threading.Thread(target=self.send, args=(end,), daemon=True)
            sender.start()
            while part := end.recv(1 << 16):
                self.echo += part
            sender.join()

    def send(self, end: socket.socket) -> None:
        end.sendall(self.data)
        end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bytes_go_both_ways_and_all_arrive(kernel: str, tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with with_python(kernel, vsock=str(path)) as vm:
        vm.run("python3 /echo.py >/dev/null 2>&1 & sleep 1").check()
        data = hashlib.shake_256(b"x").digest(2_000_003)
        talks = [Talk(path, data + bytes([n])) for n in range(3)]
        for talk in talks:
            talk.start()
        while any(talk.is_alive() for talk in talks):
            vm.go(wall_seconds=0.2)
        for talk in talks:
            assert talk.answer.startswith(b"OK ") and talk.echo == talk.data
        with closing(vm.vsock(1234)) as end:
            end.sendall(b"hello")
            vm.run("sleep 1")
            end.settimeout(LONG_S)
            assert end.recv(100) == b"hello"
        with pytest.raises(ConnectionRefusedError, match="refused: 'port 9'"):
            vm.vsock(9)
        with asked(path, 9) as refused:
            vm.run("sleep 1")
            assert line_of(refused) == b""
        assert vm.run(TROUBLE).output == ""


def test_the_guest_connects_to_a_program_of_this_computer(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with with_python("cloud-amd64", vsock=f"{path},cid=77") as vm:
        missing = vm.run("python3 /sender.py")
        assert missing.status != 0 and "Connection reset" in missing.output
        heard = bytearray()

        def listen() -> None:
            end, _ = listener.accept()
            with end:
                while part := end.recv(1 << 16):
                    heard.extend(part)
                end.sendall(b"thanks")

        with closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(f"{path}_7")
            listener.listen()
            thread = threading.Thread(target=listen, daemon=True)
            thread.start()
            digest, answer = vm.run("python3 /sender.py").check().output.split()
            thread.join()
        assert (answer, hashlib.sha256(heard).hexdigest()) == ("thanks", digest)
        program = "import socket; print(socket.socket(socket.AF_VSOCK).getsockname())"
        own = "import fcntl, struct; f = open('/dev/vsock'); "
        own += "print(struct.unpack('I', fcntl.ioctl(f, 0x7b9, bytes(4)))[0])"
        assert vm.run(f'python3 -c "{own}"').output == "77\n", program
    assert not path.exists()


def test_a_snapshot_has_no_connections_and_its_guest_is_told(tmp_path: Path) -> None:
    with with_python("cloud-amd64", vsock=str(tmp_path / "v.sock")) as vm:
        vm.run("python3 /echo.py >/dev/null 2>&1 & sleep 1").check()
        with closing(vm.vsock(1234)) as end:
            end.sendall(b"before")
            saved = vm.save()
            vm.run("sleep 1")
            assert end.recv(100) == b"before", "the VM goes on with it"
            with VM.restore(saved, vsock=str(tmp_path / "w.sock")) as again:
                again.run("sleep 1; pkill -f echo.py; python3 /echo.py >/dev/null 2>&1 & sleep 1")
                with closing(again.vsock(1234)) as other:
                    other.sendall(b"after")
                    again.run("sleep 1")
                    assert other.recv(100) == b"after"
        with vm.snapshot() as moment, moment.fork(1)[0] as clone:
            assert clone.run("echo alive").output == "alive\n"


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_comes_and_goes(kernel: str, tmp_path: Path) -> None:
    fetched(kernel)
    path = tmp_path / "v.sock"
    with VM.linux(kernel, hotplug=True) as vm:
        for _ in range(2):
            vm.plug(f"vsock={path},name=door")
            until(vm, "ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/ | grep -q virtio")
            with asked(path, 5) as refused:
                vm.run("sleep 1")
                assert line_of(refused) == b""
            until_gone(vm, "door")
            assert not path.exists()
        assert vm.run(TROUBLE).output == ""
