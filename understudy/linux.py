"""A virtual machine as its users meet it: `with VM.linux("cloud-amd64") as vm: vm.run("uname -a")`.

What: a machine that has a session with the Linux in it, and the way to boot one.
Source: none.
Invariants: `VM` decides nothing: what it is asked goes to the machine or to the session.
A VM belongs to one thread at a time; several VMs run at once on several threads.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from understudy import starting
from understudy import vm as machine
from understudy.agent.command import Terminal
from understudy.agent.result import GuestStopped, GuestTimeout, LinuxError, Result
from understudy.assembly import check_names
from understudy.closed import says_closed
from understudy.config import Config
from understudy.guests import rom
from understudy.guests.apt import Progress
from understudy.guests.entry import Entry, GuestError
from understudy.guests.release import RELEASES, usual
from understudy.linux_session import Linux
from understudy.machine.host import Host
from understudy.machine.machine import Machine
from understudy.rootfs.image import image as root_image
from understudy.starting import Start
from understudy.whole_debian.image import image
from understudy.whole_debian.making import WORKSHOP

__all__ = ["VM", "GuestStopped", "GuestTimeout", "Linux", "LinuxError", "Result", "Terminal"]

SEED_BYTES = 32
FIRST_SEED = bytes(range(1, SEED_BYTES + 1))

P = ParamSpec("P")
R = TypeVar("R")


def _of_session(method: Callable[Concatenate[Linux, P], R]) -> Callable[Concatenate["VM", P], R]:
    """A method of the session as one of the machine that has it."""

    @functools.wraps(method)
    def forwarded(vm: "VM", /, *args: P.args, **options: P.kwargs) -> R:
        return method(vm.session, *args, **options)

    return forwarded


@says_closed("console_text", "on_slice", "last_words", "state_in_words")
class VM(machine.VM):
    """A virtual machine, and in it, if one likes, a Linux.

    >>> with VM.linux("cloud-amd64", memory="256M") as vm:  # doctest: +SKIP
    ...     vm.run("uname -s").output
    'Linux\\n'
    """

    def __init__(
        self, config: Config | int | str | None = None, *, host: Host | None = None, **options: Any
    ) -> None:
        super().__init__(config, host=host, **options)
        self.session = Linux(self)

    @classmethod
    def linux(
        cls,
        guest: str | Path | None = "cloud-amd64",
        *,
        initrd: str | Path | None = None,
        append: str = "",
        host: Host | None = None,
        modules: Sequence[tuple[Path, str]] = (),
        is_firmware: bool = False,
        packages: Sequence[str] = (),
        rootfs: str | Path | None = None,
        progress: Progress | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> Self:
        """Make a VM with `guest` loaded, ready to run.

        `guest` is a name that `understudy fetch --list` shows (fetched first if it is not in the
        cache; `progress` is told about that), the path of a kernel, or None: what the first of the
        `disks` would start.  `append` is added to the kernel's command line.  `modules` are further
        files, each with its command line, for kernels that take some (Multiboot, PVH).
        `is_firmware`: the path is that of an image of a ROM.
        `packages` are Debian's, by name: they and what they depend on are unpacked into the guest's
        file system, and installed in a whole Debian (fetched like the guest).  `rootfs` is a
        folder, a tar archive or an OCI image layout: the guest's root file system is made of it.
        The rest is as for `VM`: a `config`, or its fields, such as `memory="1G"`.
        """
        if config is None:
            options.setdefault("name", "disk" if guest is None else str(guest))
        config = usual(guest, Config.of(config, **options))
        check_names(config)
        say, ramdisk = progress or _say_nothing, Path(initrd) if initrd is not None else None
        if rootfs is not None:
            config = starting.with_root(config, cls.root_of(rootfs, guest, packages, say))
        if isinstance(guest, str) and guest in RELEASES:
            config = starting.with_image(config, cls.whole(guest, packages, say))
            guest, packages = None, ()
        if packages and not isinstance(guest, str):
            raise GuestError("packages go with a guest by name, not with a kernel file")
        if is_firmware:
            assert isinstance(guest, Path)
            start = Start(rom=rom.read(guest))
        elif guest is None:
            start = starting.of_disk(config, ramdisk, append)
        elif isinstance(guest, Path):
            start = Start(guest, ramdisk, append, tuple(modules))
        else:
            start = starting.of_name(
                guest, config, ramdisk, append, modules, packages, say,
                has_own_root=rootfs is not None,
            )  # fmt: skip
        if start.rom:
            config = replace(config, rom=len(start.rom))
        # In virtual time two runs are the same run, with the same random numbers.
        is_wall = config.clock == "wall"

        def load(at: Machine) -> Entry:
            entry = start.load(at, os.urandom(SEED_BYTES) if is_wall else FIRST_SEED)
            starting.check_entry(config, entry)
            return entry

        vm = cls(config, host=host)
        try:
            vm.boot(load)
        except BaseException:
            vm.close()
            raise
        return vm

    @staticmethod
    def whole(guest: str, packages: Sequence[str] = (), progress: Progress | None = None) -> Path:
        """The image of a whole Debian with these packages, made in a VM if it is not in the cache.

        It is never to be written: `Disk(image, is_overlay=True)`.  GuestError says why not.
        """

        def boot(config: Config) -> "VM":
            return VM.linux(WORKSHOP, config=config)

        return image(guest, boot, packages, progress or _say_nothing)

    @staticmethod
    def root_of(
        source: str | Path, guest: str | Path | None, packages: Sequence[str], progress: Progress
    ) -> Path:
        """The image of a root file system for a guest, made in a VM if it is not in the cache."""
        if packages or not isinstance(guest, str) or guest in RELEASES:
            raise GuestError(
                "rootfs goes with a Linux by name that is no whole Debian, and no packages"
            )

        def boot(config: Config) -> "VM":
            return VM.linux(WORKSHOP, config=config)

        return root_image(Path(source), boot, progress)

    def close(self) -> None:
        """Give everything back to the host; what was printed can still be read."""
        if not self.is_closed:
            super().close()
            self.session.let_go()

    send = _of_session(Linux.send)
    resize_console = _of_session(Linux.resize_console)
    wait_for_prompt = _of_session(Linux.wait_for_prompt)
    wait_for_text = _of_session(Linux.wait_for_text)
    wait_for_agent = _of_session(Linux.wait_for_agent)
    start = _of_session(Linux.start)
    run = _of_session(Linux.run)
    read_file = _of_session(Linux.read_file)
    write_file = _of_session(Linux.write_file)
    put = _of_session(Linux.put)
    get = _of_session(Linux.get)
    power_off = _of_session(Linux.power_off)
    vsock = _of_session(Linux.vsock)
    run_until = _of_session(Linux.run_until)
    last_words = _of_session(Linux.last_words)
    state_in_words = _of_session(Linux.state_in_words)

    @property
    def console_text(self) -> str:
        """What the guest has printed on its console (the last megabyte of it)."""
        return self.session.console_text

    @property
    def on_slice(self) -> Callable[[], None] | None:
        """Called a few times a second while the guest is waited for."""
        return self.session.on_slice

    @on_slice.setter
    def on_slice(self, listener: Callable[[], None] | None) -> None:
        self.session.on_slice = listener


def _say_nothing(_text: str, _share: float | None) -> None:
    """For those who want no progress."""
