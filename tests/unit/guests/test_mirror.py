"""A mirror that lies gets nothing into the cache: this computer's own apt refuses it.

What: repositories in a folder, one without a signature, one whose package is another than its list
says.  Source: apt-secure(8).
"""

import hashlib
import shutil
from pathlib import Path

import pytest

from understudy.guests.apt import ONLY_OURS, Apt
from understudy.guests.entry import GuestError

GENUINE, FORGED = b"the genuine package", b"another one, as long"[: len(b"the genuine package")]


def repository(folder: Path, *, listed: bytes) -> Path:
    """One with a list of one package, which holds GENUINE."""
    (folder / "it_1_amd64.deb").write_bytes(GENUINE)
    packages = (
        "Package: it\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody\nDescription: it\n"
        f"Filename: ./it_1_amd64.deb\nSize: {len(listed)}\n"
        f"SHA256: {hashlib.sha256(listed).hexdigest()}\n"
    ).encode()
    (folder / "Packages").write_bytes(packages)
    digest = hashlib.sha256(packages).hexdigest()
    (folder / "Release").write_text(f"SHA256:\n {digest} {len(packages)} Packages\n")
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder for apt."""
    if shutil.which("apt-get") is None:
        pytest.skip("this computer has no apt-get")
    path = tmp_path / "state"
    (path / "sources.list.d").mkdir(parents=True)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "downloads").mkdir()
    return path


def client(state: Path, mirror: Path, *, is_trusted: bool = False) -> Apt:
    """One that knows this mirror alone."""
    trusted = "Trusted: yes\n" if is_trusted else ""
    (state / "sources.list.d" / ONLY_OURS).write_text(
        f"Types: deb\nURIs: copy:{mirror}\nSuites: ./\n{trusted}"
    )
    apt = Apt(state, "amd64")
    apt.update(lambda text, share: None)
    return apt


def test_a_mirror_that_has_not_signed_is_refused(state: Path) -> None:
    apt = client(state, repository(state.parent / "mirror", listed=GENUINE))
    assert apt.trouble is not None
    assert "\n" not in str(apt.trouble)
    assert apt.names("it") == []
    with pytest.raises(GuestError):
        apt.download("it", state.parent / "downloads", lambda text, share: None)
    assert list((state.parent / "downloads").iterdir()) == []


@pytest.mark.parametrize("listed", [GENUINE, FORGED])
def test_a_package_that_is_not_what_its_list_says_is_refused(state: Path, listed: bytes) -> None:
    """As if the list were signed: then only the hash can tell."""
    apt = client(state, repository(state.parent / "mirror", listed=listed), is_trusted=True)
    assert apt.trouble is None
    downloads = state.parent / "downloads"
    if listed == GENUINE:
        path = apt.download("it", downloads, lambda text, share: None)
        assert path.read_bytes() == GENUINE
        return
    with pytest.raises(GuestError):
        apt.download("it", downloads, lambda text, share: None)
    assert [path for path in downloads.rglob("*.deb") if path.is_file()] == []
