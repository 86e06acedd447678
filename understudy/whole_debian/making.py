"""How files become a system on a disk: an empty file system, and stages in a VM.

Nobody needs to be root: the computer only writes files, and root is who unpacks and configures in
the VM.  In virtual time two runs are the same run, so the same packages give the same bytes.

Source: dpkg(1), "--unpack", "--configure"; mke2fs(8).
Invariants: what a stage has left on the disk is kept once it is done, and only then, so that who
is interrupted begins with the stage in which he was; every failure is a GuestError.
"""

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from understudy.agent.result import LinuxError, Result
from understudy.backends.qcow2 import Qcow2
from understudy.backends.qcow2_new import CLUSTER, create
from understudy.config import Config
from understudy.disk import Disk
from understudy.guests.apt import Progress
from understudy.guests.cache import explained
from understudy.guests.entry import GuestError

WORKSHOP: Final = "cloud-amd64"
"""The guest in which a Debian is made."""
MEMORY: Final = "1G"
SIZE: Final = 8 << 30  # of the disk; what nobody writes takes no room
UNIT: Final = 1 << 30  # of the size of a disk
LONGEST_S: Final = 7200.0  # for one call of the second stage
SCRIPT: Final = "/second-stage"
FEATURES: Final = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
EPOCH: Final = "1704067200"  # when a guest's virtual time begins
STEPS: Final = re.compile(r"^(Unpacking|Setting up) (\S+)", re.M)


class Workshop(Protocol):
    """A VM with a Linux in it, as far as it is needed here."""

    def run(
        self, command: str, *, timeout_guest_s: float, timeout_wall_s: float,
        on_output: Callable[[bytes], None],
    ) -> Result: ...  # fmt: skip

    def write_file(self, path: str, data: bytes) -> None: ...
    def power_off(self) -> None: ...


Boot = Callable[[Config], AbstractContextManager[Workshop]]
"""Starts `WORKSHOP` with these choices."""


def uuid_of(key: str) -> str:
    """A UUID that follows from a text."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, key))


def file_system(file: Path, own: str, label: str, size: int) -> None:
    """An empty ext4 of so many bytes in a new file, with this UUID and label."""
    program = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        raise GuestError(
            "making a disk needs mke2fs, which this computer does not have: install e2fsprogs"
        )
    with file.open("wb") as new:
        new.truncate(size)
    command = [
        program, "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "1",
        "-O", FEATURES, "-J", "size=64", "-U", own, "-L", label,
        "-E", f"hash_seed={own},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        str(file),
    ]  # fmt: skip
    environment = {"MKE2FS_CONFIG": "/dev/null", "E2FSPROGS_FAKE_TIME": EPOCH, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise GuestError(f"mke2fs cannot make a file system: {reason}")


def carry_out(
    boot: Boot, disk: Path, packages: Path, script: bytes, stages: Mapping[str, str], count: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Some stages in a VM: each one's name for the script, and in words.

    packages: what is on the second disk, to be unpacked.  script: does `open`, the stages, `close`.
    count: packages of which each is spoken of once in a stage.
    """
    config = Config(
        memory=MEMORY, name=disk.stem, agent="virtio", clock="virtual",
        disks=(Disk(str(disk)), Disk(str(packages), is_read_only=True, format="raw")),
    )  # fmt: skip
    try:
        with boot(config) as vm:
            vm.write_file(SCRIPT, script)
            for stage, words in {"open": "", **stages, "close": ""}.items():
                _stage(vm, stage, words, count, progress)
            vm.power_off()
    except LinuxError as error:
        raise GuestError(f"making a disk: {error}") from None


def _stage(vm: Workshop, stage: str, words: str, count: int, progress: Progress) -> None:
    tail, done = "", 0

    def heard(data: bytes) -> None:
        nonlocal tail, done
        text = tail + data.decode("utf-8", "replace")
        whole, _, tail = text.rpartition("\n")
        steps = len(STEPS.findall(whole))
        if steps and words:
            done += steps
            progress(words, min(done / max(count, 1), 1.0))

    if words:
        progress(words, None)
    result = vm.run(
        f"busybox sh {SCRIPT} {stage}", on_output=heard, timeout_guest_s=LONGEST_S,
        timeout_wall_s=LONGEST_S,
    )  # fmt: skip
    if result.status:
        lines = [line for line in result.output.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "error" in line.lower()), "")
        raise GuestError(
            f"making a disk: the stage {stage} ended with status {result.status}: "
            f"{said or (lines or ['it said nothing'])[-1]}"
        )


def packed(raw: Path, image: Path) -> None:
    """The content of a raw image, without what is zero, as a new qcow2 image."""
    size = raw.stat().st_size
    create(image, size)
    target = Qcow2(image)
    try:
        with raw.open("rb") as source:
            at = 0
            while at < size:
                try:
                    at = os.lseek(source.fileno(), at, os.SEEK_DATA) // CLUSTER * CLUSTER
                except OSError:
                    break  # only a hole is left
                data = os.pread(source.fileno(), CLUSTER, at)
                if data.strip(b"\0"):
                    target.write(at, data)
                at += CLUSTER
        target.flush()
    finally:
        target.close()


def copied(source: Path, target: Path) -> None:
    """A copy, whose holes are holes."""
    with explained(target.parent), source.open("rb") as old, target.open("wb") as new:
        size, at = source.stat().st_size, 0
        new.truncate(size)
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            while at < end:
                os.lseek(new.fileno(), at, os.SEEK_SET)
                at += os.sendfile(new.fileno(), old.fileno(), at, end - at)
