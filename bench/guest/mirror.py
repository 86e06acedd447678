"""A package source on this computer's loopback, with some of Debian's own packages.

Source: sources.list(5); Debian Policy, "Control files and their fields".
"""

import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from understudy.guests.apt import Apt
from understudy.guests.cache import Cache


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_what: object) -> None:
        pass


@contextmanager
def mirror(folder: Path, names: Sequence[str], needs: str = "libc6") -> Iterator[int]:
    """Its port.  The packages, which need `needs`, are put into `folder`; GuestError."""
    folder.mkdir(parents=True, exist_ok=True)
    apt = Apt(Cache().root / "apt-bookworm", "amd64", release="bookworm")
    apt.update(lambda text, share: None)
    index = b""
    for name in names:
        package = apt.download(name, folder, lambda text, share: None)
        data, version = package.read_bytes(), package.name.split("_")[1]
        index += (
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: {needs}\n"
            f"Maintainer: nobody <nobody@localhost>\nDescription: {name}\n"
            f"Filename: {package.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n\n"
        ).encode()
    (folder / "Packages").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    (folder / "Release").write_text(f"Suite: test\nSHA256:\n {digest} {len(index)} Packages\n")
    handler = functools.partial(_Quiet, directory=os.fspath(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_guest(port: int, gateway: str) -> str:
    """The line for a guest's shell that makes it the only source."""
    source = f"deb [trusted=yes] http://{gateway}:{port}/ ./"
    return f"rm -rf /etc/apt/sources.list.d; echo '{source}' >/etc/apt/sources.list"
