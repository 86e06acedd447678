"""Debian's releases of which whole systems can be had, and what is in them.

Source: Debian Policy, "Essential packages" and "Priorities".
Invariant: what is listed here is all that is chosen; the rest follows from what packages need.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from understudy.backends.passt import PROGRAM
from understudy.config import Config
from understudy.nic import Nic

ESSENTIAL: Final = ("?essential", "usr-is-merged")
"""What every Debian has, as apt says it; and that /bin is a link to /usr/bin, without a program
that makes it one."""
SYSTEM: Final = (
    "apt", "ca-certificates", "dbus", "e2fsprogs", "iproute2", "iputils-ping", "kmod", "less",
    "libnss-myhostname", "libpam-systemd", "linux-image-cloud-amd64", "login", "nano", "netbase",
    "procps", "python3", "systemd-resolved", "systemd-sysv", "udev",
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A release, as a guest."""

    item: str  # in the cache
    codename: str  # as package sources call it
    description: str
    packages: tuple[str, ...] = ESSENTIAL + SYSTEM


_BOOKWORM: Final = Release(
    "debian-12", "bookworm", "Debian 12, a whole system on a disk: systemd, apt, Python"
)
_TRIXIE: Final = Release(
    "debian-13", "trixie", "Debian 13, a whole system on a disk: systemd, apt, Python"
)
RELEASES: Final = {"debian": _BOOKWORM, "debian-12": _BOOKWORM, "debian-13": _TRIXIE}
"""By the guest's name."""


def usual(guest: str | Path | None, config: Config) -> Config:
    """What a guest has if nothing else is said: a whole Debian has a network, where passt is."""
    if isinstance(guest, str) and guest in RELEASES and not config.net and shutil.which(PROGRAM):
        return replace(config, net=(Nic("user"),))
    return config
