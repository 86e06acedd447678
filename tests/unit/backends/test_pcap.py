"""A file of frames that cannot be written any more says so, once."""

import warnings
from pathlib import Path

import pytest

from understudy.backends.cable import NetworkError
from understudy.backends.frame import Frame
from understudy.backends.pcap import Pcap


def test_a_full_disk_is_told_once() -> None:
    with pytest.warns(RuntimeWarning, match="pcap /dev/full: No space left on device"):
        pcap = Pcap("/dev/full", lambda: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pcap.heard(True, Frame(bytes(60)))
        pcap.close()


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="No such file or directory: choose another name"):
        Pcap(str(tmp_path / "none" / "file"), lambda: 0)
