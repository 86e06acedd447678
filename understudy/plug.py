"""What can be plugged into a VM, also while it runs: disks, network cards, shared
folders, a socket to the host.

Source: ours.
"""

from collections.abc import Iterator
from typing import Final

from understudy.config import Config
from understudy.disk import Disk
from understudy.nic import Nic
from understudy.share import Share
from understudy.vsock import Vsock

Thing = Disk | Nic | Share | Vsock
KINDS: Final[dict[str, tuple[type[Thing], str]]] = {
    "disk": (Disk, "disks"), "net": (Nic, "net"), "share": (Share, "folders"),
    "vsock": (Vsock, "vsock"),
}  # fmt: skip
"""By what it is called: how it is described, and in which field of a `Config` it is."""


def parse(text: str) -> Thing:
    """What is to be plugged in, as on the command line: disk=FILE,… or net=KIND,… and so on."""
    kind, _, what = text.partition("=")
    if not what or kind not in KINDS:
        raise ValueError(f"{text!r}: expected disk=FILE, net=KIND, share=FOLDER or vsock=PATH")
    return KINDS[kind][0].parse(what)


def kind_of(one: Thing) -> str:
    """What it is called."""
    return next(kind for kind, (known, _) in KINDS.items() if isinstance(one, known))


def named(config: Config) -> Iterator[tuple[str, Thing]]:
    """All that can be unplugged, by its name."""
    for kind, (_, field) in KINDS.items():
        for number, one in enumerate(getattr(config, field)):
            yield one.name or f"{kind}{number}", one
