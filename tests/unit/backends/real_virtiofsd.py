"""The real virtiofsd for tests, where this computer has one."""

from pathlib import Path

import pytest

from understudy.backends.folder import ShareError
from understudy.backends.virtiofsd import found


def _is_there() -> bool:
    try:
        found(Path("/"))
    except ShareError:
        return False
    return True


needs_virtiofsd = pytest.mark.skipif(
    not _is_there(),
    reason="no virtiofsd of 1.13 or later: apt-get install virtiofsd (Debian 13), or cargo install "
    "virtiofsd (with libcap-ng-dev and libseccomp-dev) and have it in $PATH",
)
