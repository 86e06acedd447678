"""Folders that a guest shares are mounted in it: by its agent, since every guest has one.

Source: ours; Linux's mount(2), filesystems/virtiofs.rst.
Invariant: doing it again changes nothing.
"""

import errno
import os
from collections.abc import Iterable
from typing import Final

from understudy.agent.calls import Call, Request
from understudy.agent.result import LinuxError
from understudy.agent.steps import Steps
from understudy.config import Config
from understudy.plug import named
from understudy.share import Share

READ_ONLY, NO_SUID, NO_DEV = 1, 2, 4  # MS_*
KIND: Final = "virtiofs"
REASONS: Final = {
    errno.ENODEV: f"the guest's kernel has no {KIND}",
    errno.EINVAL: f"the guest's driver of {KIND} has not found it",
}


def mounted(config: Config) -> Steps[None]:
    """The steps by which all folders are where they are to be.  LinuxError says why not."""
    for tag, share in named(config):
        if isinstance(share, Share):
            yield from _mounted(tag, share)


def _mounted(tag: str, share: Share) -> Steps[None]:
    request = Request()
    for folder in _above(share.mount):
        request.call(Call.MKDIR, request.text(folder), 0o755)
    flags = NO_SUID | NO_DEV | (0 if share.is_writable else READ_ONLY)
    call = request.call(
        Call.MOUNT, request.text(tag), request.text(share.mount), request.text(KIND), flags, 0
    )
    number = -(yield request)[call]
    if number in (0, errno.EBUSY):  # the same file system at the same place
        return
    why = REASONS.get(number) or os.strerror(number)
    raise LinuxError(f"{share.folder} cannot be mounted at {share.mount} in the guest: {why}")


def _above(mount: str) -> Iterable[str]:
    parts = mount.strip("/").split("/")
    return ("/" + "/".join(parts[: depth + 1]) for depth in range(len(parts)))
