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

from understudy import vm as machine
from understudy.agent.command import Terminal
from understudy.agent.result import GuestStopped, GuestTimeout, LinuxError, Result
from understudy.assembly import check_names
from understudy.closed import says_closed
from understudy.config import Config
from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import debian, loader, network, rom
from understudy.guests import modules as drivers
from understudy.guests import packages as debian_packages
from understudy.guests.apt import Progress
from understudy.guests.entry import Entry, GuestError
from understudy.linux_session import Linux
from understudy.machine.host import Host
from understudy.machine.machine import Machine

__all__ = ["VM", "GuestStopped", "GuestTimeout", "Linux", "LinuxError", "Result", "Terminal"]

SEED_BYTES = 32

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
        guest: str | Path = "cloud-amd64",
        *,
        initrd: str | Path | None = None,
        append: str = "",
        host: Host | None = None,
        modules: Sequence[tuple[Path, str]] = (),
        is_firmware: bool = False,
        packages: Sequence[str] = (),
        progress: Progress | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> Self:
        """Make a VM with `guest` loaded, ready to run.

        `guest` is a name that `understudy fetch --list` shows (fetched first if it is not in the
        cache; `progress` is told about that), or the path of a kernel.  `append` is added to the
        kernel's command line.  `modules` are further files, each with its command line, for kernels
        that take some (Multiboot, PVH).  `is_firmware`: the path is that of an image of a ROM.
        `packages` are Debian's, by name: they and what they depend on are unpacked into the guest's
        file system (fetched like the guest).  The rest is as for `VM`: a `config`, or its fields,
        such as `memory="1G"`.
        """
        if config is None:
            options.setdefault("name", str(guest))
        config = Config.of(config, **options)
        check_names(config)
        kernel: Path | bytes
        ramdisk: Path | None = Path(initrd) if initrd is not None else None
        if isinstance(guest, Path):
            if packages:
                raise GuestError("packages go with a guest by name, not with a kernel file")
            kernel = guest
        else:
            fetched = debian.fetch(guest, progress or _say_nothing)
            kernel, ramdisk = fetched.kernel, ramdisk or fetched.initrd
            modules = [*fetched.modules, *modules]
            is_firmware = fetched.is_firmware
            append = f"{fetched.append} {append}".strip()
            if packages:
                ramdisk = _with_packages(guest, ramdisk, packages, progress or _say_nothing)
            if initrd is None and ramdisk is not None and config.has_virtio:
                inserted = drivers.INSERTED + (drivers.BALLOON if config.balloon else ())
                ramdisk = drivers.with_drivers(
                    guest, ramdisk, progress or _say_nothing, more=_network(config, inserted),
                    inserted=inserted,
                )  # fmt: skip
                append = f"{append} {drivers.APPEND}"

        if is_firmware:
            assert isinstance(kernel, Path)
            image = rom.read(kernel)
            config = replace(config, rom=len(image))

        def load(at: Machine) -> Entry:
            if is_firmware:
                return rom.load(at.memory, image)
            # In virtual time two runs are the same run, with the same random numbers.
            is_wall = config.clock == "wall"
            seed = os.urandom(SEED_BYTES) if is_wall else bytes(range(1, SEED_BYTES + 1))
            return loader.load(
                at.memory, kernel, initrd=ramdisk, append=append, rsdp=RSDP_GPA, seed=seed,
                modules=modules,
            )  # fmt: skip

        vm = cls(config, host=host)
        try:
            vm.boot(load)
        except BaseException:
            vm.close()
            raise
        return vm

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


def _with_packages(
    guest: str, ramdisk: Path | None, names: Sequence[str], progress: Progress
) -> Path:
    """The guest's RAM disk with Debian packages in it."""
    if ramdisk is None:
        raise GuestError(f"{guest} has no file system to unpack packages into: choose a Linux")
    architecture = debian.PACKAGES[guest].architecture
    return debian_packages.with_packages(ramdisk, names, progress, architecture=architecture)


def _network(config: Config, inserted: tuple[str, ...]) -> bytes:
    """What the guest needs to ask for an address, if it has a card at which somebody knows one."""
    users = [number for number, nic in enumerate(config.net) if nic.kind == "user"]
    return network.asking(f"eth{users[0]}", inserted) if users else b""


def _say_nothing(_text: str, _share: float | None) -> None:
    """For those who want no progress."""
