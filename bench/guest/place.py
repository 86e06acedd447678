"""The two places where a Debian runs, and what a row needs in one: disks, networks, a neighbor.

A bed is what one row after the other runs in: a guest alone with a card to passt, or two guests on
a network of their own.

Source: qemu-system(1); passt(1).
Invariants: both places get the same image, kernel, initrd, command line, memory and scratch disk;
nothing is left behind by `stop`.
"""

import os
import shutil
import socket
import subprocess
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.guest.machine import Machine, Own, Qemu
from bench.guest.mirror import in_guest
from bench.guest.rows import GATEWAY, PEER, SCRATCH_MB, Row
from bench.markers import Failed
from understudy.backends.opening import open_disk
from understudy.disk import Disk
from understudy.guests import boot_disk
from understudy.host import Host
from understudy.linux import VM

MEMORY: Final = "1G"
# A guest that waits for its turn must not take that for a lock-up.
APPEND: Final = "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
ADDRESSED: Final = (
    "for n in $(seq 100); do ip route | grep -q ^default && break; sleep 0.2; done; "
    "ip route | grep ^default"
)
OWN_ADDRESS: Final = "10.9.0.1"
SETTING_UP_S: Final = 300.0


class Place(ABC):
    """Where guests run.  `start` may be called again after `stop`."""

    name: str

    def __init__(self, image: Path, folder: Path, mirror_port: int) -> None:
        self.image, self.folder, self.mirror_port = image, folder, mirror_port
        self.given = ExitStack()
        self.one: Machine | None = None
        self.peer: Machine | None = None
        self.scratch = folder / f"scratch-{self.name}.img"
        with self.scratch.open("wb") as file:
            for _ in range(SCRATCH_MB):
                file.write(os.urandom(1 << 20))

    def start(self, *, is_pair: bool) -> float:
        """Guests with somebody logged in; the seconds from nothing to the first one's login."""
        try:
            self.one = self.pair() if is_pair else self.alone()
            seconds = self.one.boot()
            self.one.log_in()
            if is_pair:
                assert self.peer is not None
                self.peer.boot()
                self.peer.log_in()
                self.one.run(_numbered(OWN_ADDRESS), SETTING_UP_S)
                self.peer.run(_numbered(PEER), SETTING_UP_S)
            else:
                self.one.run(ADDRESSED, SETTING_UP_S)
                self.one.run(in_guest(self.mirror_port, GATEWAY), SETTING_UP_S)
                self.one.run("apt-get update", SETTING_UP_S)
        except BaseException:
            self.stop()
            raise
        return seconds

    def run(self, row: Row, scale: float, port: int, timeout: float) -> float:
        """What a row takes, in seconds."""
        assert self.one is not None
        if row.is_warmed:
            self._run(row, 0, port, timeout)
        seconds = self._run(row, scale, port, timeout)
        if row.after:
            self.one.run(row.after, timeout)
        return seconds

    def _run(self, row: Row, scale: float, port: int, timeout: float) -> float:
        assert self.one is not None
        if row.peer:
            assert self.peer is not None
            self.peer.run(row.peer, timeout)
        return self.one.run(row.command(scale, port), timeout)

    def stop(self) -> None:
        """End all that was started."""
        self.one = self.peer = None
        self.given.close()

    def log(self, what: str) -> Path:
        """The file for a console."""
        return self.folder / f"{self.name}-{what}.log"

    @abstractmethod
    def alone(self) -> Machine:
        """A guest with a card to passt, started."""

    @abstractmethod
    def pair(self) -> Machine:
        """Two on a network of their own, started: one, and `self.peer`."""


def _numbered(address: str) -> str:
    return f"ip addr add {address}/24 dev eth0; ip link set eth0 up"


class Tcg(Place):
    """QEMU's translator, with all that it has (`-cpu max`)."""

    name = "tcg"

    def __init__(self, image: Path, folder: Path, mirror_port: int) -> None:
        for program in ("qemu-system-x86_64", "passt"):
            if shutil.which(program) is None:
                raise Failed(f"no {program} on this computer: install qemu-system-x86 and passt")
        super().__init__(image, folder, mirror_port)
        disk = open_disk(Disk(str(image), is_read_only=True))
        try:
            found = boot_disk.read(disk, str(image))
        finally:
            disk.close()
        self.append = f"{found.append} {APPEND}"
        self.kernel, self.initrd = folder / "kernel", folder / "initrd"
        self.kernel.write_bytes(found.kernel)
        self.initrd.write_bytes(found.initrd or b"")

    def alone(self) -> Machine:
        ours, theirs = self._wire()
        options = ["--foreground", "--quiet", "--fd", str(theirs), "--address", "10.0.2.15",
                   "--netmask", "24", "--gateway", GATEWAY]  # fmt: skip
        passt = subprocess.Popen(
            ["passt", *options], pass_fds=(theirs,), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        self.given.callback(passt.wait)
        self.given.callback(passt.kill)
        return self._started("one", ours, self.scratch)

    def pair(self) -> Machine:
        ours, theirs = self._wire()
        one = self._started("one", ours, self.scratch)
        self.peer = self._started("peer", theirs, None)
        return one

    def _wire(self) -> tuple[int, int]:
        ends = socket.socketpair()
        for end in ends:
            self.given.callback(end.close)
        return ends[0].fileno(), ends[1].fileno()

    def _started(self, what: str, wire: int, scratch: Path | None) -> Machine:
        command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", MEMORY,
                   "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot",
                   "-serial", "stdio", "-kernel", str(self.kernel), "-initrd", str(self.initrd),
                   "-append", self.append,
                   "-drive", f"file={self.image},format=qcow2,if=virtio,snapshot=on",
                   "-netdev", f"stream,id=net,addr.type=fd,addr.str={wire}",
                   "-device", "virtio-net-pci,netdev=net"]  # fmt: skip
        if scratch is not None:
            command += ["-drive", f"file={scratch},format=raw,if=virtio"]
        machine = Qemu(self.log(what), command, (wire,))
        self.given.callback(machine.close)
        return machine


class Understudy(Place):
    """understudy: alone as `understudy run` has it; two on a host with a processor each."""

    name = "understudy"

    def alone(self) -> Machine:
        return self._kept(Own(self.log("one"), lambda: self._made(VM, "user,host-loopback", True)))

    def pair(self) -> Machine:
        host = self.given.enter_context(Host(pcpus=2, clock="wall"))
        one = self._kept(Own(self.log("one"), lambda: self._made(host, "lan=bench", True)))
        self.peer = self._kept(Own(self.log("peer"), lambda: self._made(host, "lan=bench", False)))
        return one

    def _made(self, maker: "type[VM] | Host", net: str, has_scratch: bool) -> VM:
        image = Disk(str(self.image), is_overlay=True)
        scratch = (Disk(str(self.scratch), format="raw"),) if has_scratch else ()
        options = {"disks": (image, *scratch), "net": net, "memory": MEMORY, "clock": "wall",
                   "append": APPEND, "name": "one" if has_scratch else "peer"}  # fmt: skip
        return maker.linux(None, **options)  # type: ignore[arg-type]

    def _kept(self, machine: Own) -> Own:
        self.given.callback(machine.close)
        return machine


PLACES: Final = {kind.name: kind for kind in (Tcg, Understudy)}
