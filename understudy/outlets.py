"""What connects a board with the outside: rows for disks, cards, folders, sockets; the cards.

Source: ours.  Invariant: what a row opens is closed by the `given` that it was made with.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from understudy.backends.folder import Folder, ShareError
from understudy.backends.network import cable_of
from understudy.backends.opening import open_disk
from understudy.backends.pcap import Pcap
from understudy.backends.unix_ports import UnixPorts
from understudy.backends.virtiofsd import Virtiofsd
from understudy.config import Config
from understudy.devices.board import Row
from understudy.devices.pc import PC
from understudy.devices.virtio.balloon import Balloon
from understudy.devices.virtio.blk import MOST_QUEUES
from understudy.devices.virtio.fs import LONGEST_ANSWER, LONGEST_REQUEST, QUEUES
from understudy.devices.virtio.fs_daemon import Daemon
from understudy.devices.virtio.net import MOST_PAIRS, Net
from understudy.devices.virtio.vsock import Vsock as Vsocket
from understudy.disk import Disk
from understudy.nic import Nic
from understudy.share import Share
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop, StopKind
from understudy.vsock import Vsock


def disk_row(
    usual: str, config: Config, disk: Disk, request: Callable[[Stop], None], given: ExitStack
) -> Row:
    """A row for a disk, with its content, which `given` closes."""
    medium = open_disk(disk, is_snapshot=config.snapshot)
    given.callback(medium.close)

    def stop(problem: str) -> None:
        request(Stop(StopKind.DISK, f"{disk.file}: {problem}"))

    options = {
        "name": disk.name or usual, "slot": disk.slot or None, "medium": medium,
        "serial": disk.serial, "rate": disk.rate, "queues": min(config.topology.count, MOST_QUEUES),
    }  # fmt: skip
    return "virtio_blk", options | ({"stop": stop} if disk.on_error == "stop" else {})


def net_row(
    usual: str, config: Config, nic: Nic, epoch_ns: int, clock: GuestClock, given: ExitStack
) -> Row:
    """A row for a network card, with its cable, which `given` closes."""
    cable = cable_of(nic, config.publish)
    given.callback(cable.close)
    name = nic.name or usual
    if nic.pcap:
        pcap = Pcap(nic.pcap, lambda: epoch_ns + clock.now())
        cable.on_frame.append(pcap.heard)
        cable.on_close.append(pcap.close)
    return "virtio_net", {
        "name": name, "slot": nic.slot or None, "mac": nic.address,
        "named": f"{config.name}/{name.removeprefix('net')}", "cable": cable, "rate": nic.rate,
        "pairs": min(config.topology.count, MOST_PAIRS),
    }  # fmt: skip


def share_row(usual: str, config: Config, share: Share, given: ExitStack) -> Row:
    """A row for a folder, which `given` closes; the guest finds it by its name."""
    folder = Folder(Path(share.folder), is_writable=share.is_writable)
    given.callback(folder.close)
    name = share.name or usual
    own = {"name": name, "slot": share.slot or None, "tag": name}
    if share.server != "python" and config.clock == "wall":
        try:
            daemon = _daemon(share)
        except ShareError:
            if share.server != "auto":
                raise
        else:
            folder.close()
            given.callback(daemon.close)
            return "virtio_fs", own | {"daemon": daemon}
    return "virtio_fs", own | {"folder": folder}


def _daemon(share: Share) -> Daemon:
    path = Path(share.folder)
    longest = LONGEST_REQUEST, LONGEST_ANSWER
    program = Virtiofsd(path, is_writable=share.is_writable, queues=QUEUES, longest=longest)
    return Daemon(path, program)


def vsock_row(usual: str, vsock: Vsock, given: ExitStack) -> Row:
    """A row for a socket to the host, with its path, which `given` gives up."""
    ports = UnixPorts(Path(vsock.path)) if vsock.path else None
    if ports is not None:
        given.callback(ports.close)
    own = {"name": vsock.name or usual, "slot": vsock.slot or None}
    return "virtio_vsock", own | {"cid": vsock.cid, "ports": ports}


def connect(board: PC, part: Net | Vsocket, post: Callable[[Callable[[], None]], None]) -> None:
    """Have a part hear of what comes from outside, as long as it is on the board."""

    def look() -> None:
        if part in board.parts.values():
            part.look()

    def tell() -> None:
        with suppress(RuntimeError):  # the VM is being closed
            post(look)

    if isinstance(part, Net):
        part.cable.notify = tell
    else:
        part.listen(tell)


def cards_of(board: PC) -> list[Net]:
    """The network cards."""
    return [part for part in board.parts.values() if isinstance(part, Net)]


def cards_by_row(config: Config, board: PC) -> list[tuple[Nic, Net]]:
    """The network cards of `config.net`: a device of the board may be a card, too."""
    return [(nic, board.part(nic.name or f"net{n}", Net)) for n, nic in enumerate(config.net)]


def balloons_of(board: PC) -> list[Balloon]:
    """The balloon, if it has one."""
    return [part for part in board.parts.values() if isinstance(part, Balloon)]


def carried(board: PC) -> dict[str, Any]:
    """What its network cards have carried, and what its balloon has given, if it has any."""
    cards, balloons = cards_of(board), balloons_of(board)
    told: dict[str, Any] = {"net": [card.counts() for card in cards]} if cards else {}
    return told | ({"balloon": balloons[0].counts()} if balloons else {})
