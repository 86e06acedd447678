"""`understudy run`.

What: checks what was asked for, boots it, lends it the terminal or runs one command in it.
Source: none.
Invariants: with --exec, standard output carries that command's and nothing else; --counts is
written however the run ends.
"""

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from understudy.commands import Refusal
from understudy.commands.fetch import USUAL
from understudy.commands.progress import StatusLine, Steps
from understudy.commands.vm_options import Said, with_vm_options
from understudy.config import Config
from understudy.disk import Disk
from understudy.guests.release import usual
from understudy.quantities import bytes_in_words, bytes_of, parse_span
from understudy.terminal import ending_signals, is_interactive

if TYPE_CHECKING:
    from understudy.linux import VM

WISHES: Final = ("help", "?", ("help",), ("?",))
"""Values that ask what one can choose from; the latter where there may be several."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, checked."""

    guest: str | Path | None  # None: what is on the first disk
    initrd: Path | None
    modules: tuple[tuple[Path, str], ...]
    is_firmware: bool
    append: str
    packages: tuple[str, ...]
    rootfs: Path | None
    config: Config
    command: str | None
    counts: Path | None
    watch: bool
    control: Path | None
    timeout_s: float | None
    interactive: bool
    takes_input: bool
    has_terminal: bool


@with_vm_options
def run(
    *,
    guest: Annotated[
        str | None,
        typer.Option("--guest", "-g", metavar="NAME", help="A guest by name: see fetch --list."),
    ] = None,
    kernel: Annotated[
        Path | None,
        typer.Option(
            "--kernel", "-k", metavar="FILE", help="Your own kernel: bzImage, ELF, PVH, Multiboot."
        ),
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option("--initrd", metavar="FILE", help="Its initial RAM disk.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--module",
            metavar="FILE[,ARGS]",
            help="A further file for a Multiboot or PVH kernel, and its command line.  "
            "May be repeated.",
        ),
    ] = None,
    firmware: Annotated[
        Path | None,
        typer.Option(
            "--firmware", metavar="FILE", help="An image of a ROM, started at its reset vector."
        ),
    ] = None,
    append: Annotated[
        str, typer.Option("--append", metavar="TEXT", help="Added to the kernel's command line.")
    ] = "",
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PACKAGE",
            help="A Debian package to have in the guest, with all it needs.  May be repeated.",
        ),
    ] = None,
    rootfs: Annotated[
        Path | None,
        typer.Option(
            "--rootfs",
            metavar="DIR|TAR|LAYOUT",
            help="A folder, a tar archive or an OCI image layout to make the guest's root file "
            "system of; with --guest, cloud-amd64 if none is said.",
        ),
    ] = None,
    seed: Annotated[
        Path | None,
        typer.Option(
            "--seed",
            metavar="FILE",
            help="User-data for cloud-init in the guest, on a further disk: "
            "the same as --disk FILE,format=nocloud.",
        ),
    ] = None,
    said: Said,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec",
            "-e",
            metavar="COMMAND",
            help="Run it in the guest, print its output, end.  A file at standard input is its "
            "input.  With --kernel alone, in a user land of busybox.",
        ),
    ] = None,
    takes_input: Annotated[
        bool,
        typer.Option(
            "--stdin", "-i", help="With --exec: what comes by standard input is its, as it comes."
        ),
    ] = False,
    has_terminal: Annotated[
        bool, typer.Option("--tty", "-t", help="With --exec: give the command this terminal.")
    ] = False,
    counts: Annotated[
        Path | None,
        typer.Option("--counts", metavar="FILE.json", help="Write what was counted, as JSON."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show counts in the terminal's last line; Ctrl-] l ends it."),
    ] = False,
    control: Annotated[
        Path | None,
        typer.Option(
            "--control",
            metavar="SOCKET",
            help="Make a socket through which `understudy control` and `inspect` reach the VM.",
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="End after this much real time, like 90s."),
    ] = None,
) -> None:
    """Boot a guest; its console is this terminal.  Ctrl-] h shows the keys, Ctrl-] q ends it.

    Without a terminal, standard input is typed at the guest's first prompt; when it has ended and
    the guest is back at its prompt, the run ends (not with --control).

    The status is 0 after a power-off, the command's own with --exec, and not 0 otherwise.

    Examples:

      understudy run --guest hello

      understudy run --guest cloud-amd64

      understudy run --guest cloud-amd64 --exec "uname -a"

      tar c folder | understudy run --guest cloud-amd64 --stdin --exec "tar x && ls"

      understudy run --guest cloud-amd64 --tty --exec "vi /etc/passwd"

      understudy run --guest cloud-amd64 --exec true --counts counts.json

      understudy run --guest cloud-amd64 --with stress-ng --exec "stress-ng --vm 1 -t 5s"

      understudy run --guest cloud-amd64 --disk data.img --disk debian.img,ro

      understudy run --guest cloud-amd64 --share src --share out:/srv/out,rw --exec "ls /mnt/src"

      understudy run --guest 686 --control vm.sock

      understudy run --kernel vmlinuz --initrd initrd.img --append "quiet" --memory 512M

      understudy run --kernel xen.gz --module "vmlinuz,console=hvc0" --module initrd.img -m 512M

      understudy run --guest debian

      understudy run --disk debian.qcow2 --seed user-data

      understudy run --rootfs alpine.tar --net user

      understudy run --firmware u-boot.rom
    """
    if wish := next((name for name, value in said.items() if value in WISHES), None):
        from understudy.commands.choices import CHOICES

        if wish in CHOICES:
            typer.echo(CHOICES[wish]())
            raise typer.Exit
    if seed is not None:
        said["disks"] = (*said.get("disks", ()), Disk(str(seed), format="nocloud"))
    if rootfs is not None and guest is None and kernel is None and firmware is None:
        guest = USUAL
    wanted = _checked(
        guest,
        kernel,
        initrd,
        modules or [],
        firmware,
        append,
        tuple(packages or ()),
        rootfs,
        said,
        command,
        counts,
        watch,
        control,
        timeout,
        takes_input=takes_input,
        has_terminal=has_terminal,
    )
    with ending_signals():
        status = _carry_out(wanted)
    raise typer.Exit(status)


def _checked(
    guest: str | None,
    kernel: Path | None,
    initrd: Path | None,
    modules: list[str],
    firmware: Path | None,
    append: str,
    packages: tuple[str, ...],
    rootfs: Path | None,
    said: Said,
    command: str | None,
    counts: Path | None,
    watch: bool,
    control: Path | None,
    timeout: str | None,
    *,
    takes_input: bool,
    has_terminal: bool,
) -> Wanted:
    starts = sum(start is not None for start in (guest, kernel, firmware))
    if starts > 1 or (not starts and not said.get("disks")):
        raise typer.BadParameter(
            "say one of --guest NAME, --kernel FILE and --firmware FILE, or a --disk to boot from"
        )
    if firmware is not None and (initrd is not None or modules or append or command is not None):
        raise typer.BadParameter(
            "--firmware starts what it finds by itself: --initrd, --module, --append and --exec go "
            "with --kernel"
        )
    files = [(Path(name), line) for name, _, line in (one.partition(",") for one in modules)]
    if guest is not None and initrd is not None:
        raise typer.BadParameter("--initrd goes with --kernel; a named guest brings its own")
    if packages and guest is None:
        raise typer.BadParameter("--with goes with --guest; with --kernel bring an --initrd")
    if rootfs is not None and guest is None:
        raise typer.BadParameter("--rootfs goes with --guest; with --kernel bring an --initrd")
    if command is not None and not command.strip():
        raise typer.BadParameter("--exec is empty; give a command, like --exec 'uname -a'")
    if command is None and (takes_input or has_terminal):
        raise typer.BadParameter("--stdin and --tty go with --exec; a console has both by itself")
    if has_terminal and not is_interactive():
        raise typer.BadParameter("--tty needs a terminal at standard input and output: --stdin")
    for file in (kernel, initrd, firmware, *(file for file, _ in files)):
        if file is not None and not file.is_file():
            raise Refusal(f"{file}: no such file" if not file.exists() else f"{file}: not a file")
    try:
        timeout_s = parse_span(timeout) if timeout is not None else None
    except ValueError as error:
        raise typer.BadParameter(f"--timeout: {error}") from None
    for option, file in (("--counts", counts), ("--control", control)):
        if file is not None and not file.absolute().parent.is_dir():
            raise Refusal(f"{option}: there is no folder {file.absolute().parent}")
    if counts is not None and not _can_be_written(counts):
        raise Refusal(f"--counts: {counts} cannot be written: choose another name")
    interactive = command is None and is_interactive()
    if watch and not interactive:
        raise typer.BadParameter("--watch needs a terminal, and no --exec; see --counts")
    chosen = guest if guest is not None else kernel or firmware
    try:
        config = usual(chosen, Config.of(**{"name": str(chosen or "disk"), **said}))
        is_live = interactive or takes_input or has_terminal or config.has_outside
        if "clock" not in said and is_live:
            config = replace(config, clock="wall")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return Wanted(
        guest=chosen,
        initrd=initrd,
        modules=tuple(files),
        is_firmware=firmware is not None,
        append=append,
        packages=packages,
        rootfs=rootfs,
        config=config,
        command=command,
        counts=counts,
        watch=watch,
        control=control,
        timeout_s=timeout_s,
        interactive=interactive,
        takes_input=takes_input,
        has_terminal=has_terminal,
    )


def _carry_out(wanted: Wanted) -> int:
    """Boot and run; the result is the status for the shell."""
    # Imported late: `understudy --help` must work, and quickly, without the compiled half.
    from understudy.backends.cable import NetworkError
    from understudy.backends.folder import ShareError
    from understudy.backends.opening import ImageError
    from understudy.backends.unix_ports import VsockError
    from understudy.commands.console import converse, execute
    from understudy.control import ControlError, ControlSocket
    from understudy.guests import debian
    from understudy.guests.entry import GuestError
    from understudy.linux import VM, LinuxError

    name = wanted.guest.name if isinstance(wanted.guest, Path) else wanted.guest or "disk"
    with ExitStack() as stack:
        line = stack.enter_context(StatusLine(name))
        try:
            with Steps(name) as steps:
                initrd, append = wanted.initrd, wanted.append
                if isinstance(wanted.guest, Path) and wanted.command is not None and not initrd:
                    initrd = debian.user_land(steps)  # somebody must carry the command out
                    append = f"{debian.LINUX_APPEND} {append}".strip()
                vm = VM.linux(
                    wanted.guest,
                    initrd=initrd,
                    modules=wanted.modules,
                    is_firmware=wanted.is_firmware,
                    append=append,
                    packages=wanted.packages,
                    rootfs=wanted.rootfs,
                    config=wanted.config,
                    progress=steps,
                )
            stack.enter_context(vm)
            if wanted.counts is not None:
                stack.callback(_write_counts, vm, wanted.counts)
            if wanted.control is not None:
                stack.enter_context(ControlSocket(vm, wanted.control))
            if wanted.command is not None:
                return execute(
                    vm, wanted.command, wanted.timeout_s, line,
                    takes_input=wanted.takes_input, has_terminal=wanted.has_terminal,
                )  # fmt: skip
            return converse(
                vm,
                wanted.timeout_s,
                line,
                interactive=wanted.interactive,
                watch=wanted.watch,
                stays=wanted.control is not None,
            )
        except (GuestError, LinuxError) as error:
            line.clear()
            raise Refusal(str(error), detail=getattr(error, "detail", "")) from None
        except ControlError as error:
            raise Refusal(f"--control: {error}") from None
        except (ImageError, NetworkError, ShareError, VsockError) as error:
            raise Refusal(str(error)) from None
        except ValueError as error:  # a size or a name that the machine refuses
            raise Refusal(str(error), status=2) from None
        except MemoryError as error:
            size = bytes_in_words(bytes_of(wanted.config.memory))
            raise Refusal(str(error) or f"this computer cannot give {size}") from None


def _write_counts(vm: "VM", file: Path) -> None:
    text = json.dumps(vm.counts(), indent=2, sort_keys=True) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refusal(f"--counts: {file}: {error.strerror}") from None


def _can_be_written(file: Path) -> bool:
    place = file if file.exists() else file.absolute().parent
    return str(file) == "-" or (not file.is_dir() and os.access(place, os.W_OK))
