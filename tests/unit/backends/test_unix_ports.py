"""Sockets for a guest's ports: no link is followed; descriptors that run out keep nobody busy."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from understudy.backends import descriptors
from understudy.backends.unix_ports import UnixPorts
from understudy.config import Config
from understudy.share import Share
from understudy.vsock import Vsock


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[UnixPorts]:
    made = UnixPorts(tmp_path / "v")
    yield made
    made.close()


@pytest.fixture
def no_more() -> Iterator[ExitStack]:
    """All the descriptors that this process may have are in use; closing it gives them back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    with ExitStack() as taken:
        try:
            while True:
                taken.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError:
            yield taken
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def listening(given: ExitStack, path: Path) -> socket.socket:
    end = given.enter_context(socket.socket(socket.AF_UNIX))
    end.bind(os.fspath(path))
    end.listen()
    return end


def test_a_link_leads_to_no_other_socket(ports: UnixPorts, tmp_path: Path) -> None:
    with ExitStack() as given:
        listening(given, tmp_path / "outside")
        (tmp_path / "v_1").symlink_to(tmp_path / "outside")
        listening(given, tmp_path / "v_2")
        assert ports.connect(1) is None and ports.connect(3) is None
        end = ports.connect(2)
        assert end is not None
        end.close()


def test_without_descriptors_nobody_is_connected_and_who_comes_is_sent_away(
    ports: UnixPorts, tmp_path: Path, no_more: ExitStack
) -> None:
    assert descriptors.are_scarce() and ports.connect(2) is None
    no_more.pop_all().close()
    client = socket.socket(socket.AF_UNIX)
    with client, ExitStack() as taken:
        client.connect(os.fspath(tmp_path / "v"))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        assert ports.accept() is None
        assert client.recv(1) == b"", "he is not left to be heard of for ever"
    assert not descriptors.are_scarce()


def test_half_of_the_descriptors_are_not_for_guests(ports: UnixPorts, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as given:
        listening(given, tmp_path / "v_2")
        client = given.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(os.fspath(tmp_path / "v"))
        given.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * client.fileno(), limits[1]))
        assert descriptors.are_scarce()
        assert ports.connect(2) is None and ports.accept() is None
        assert client.recv(1) == b""


def test_a_path_in_a_folder_that_the_guest_writes_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "within").mkdir()
    vsock = (Vsock(str(tmp_path / "within" / ".." / "v")),)
    Config(folders=(Share(str(tmp_path)),), vsock=vsock)
    Config(folders=(Share(str(tmp_path / "within"), is_writable=True),), vsock=vsock)
    with pytest.raises(ValueError, match="expected a path outside of it"):
        Config(folders=(Share(str(tmp_path), is_writable=True),), vsock=vsock)
