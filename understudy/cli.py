"""`understudy`: the command line.

What: gathers the commands and turns whatever they raise into one line and a status.
Source: none.
Invariants: status 0 is success, 2 is a wrong use, 1 any other trouble (a guest's own status comes
through as it is); the user never sees a traceback: a bug of ours leaves a report in a file.
"""

import functools
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from understudy.commands import Refusal
from understudy.commands.attach import console
from understudy.commands.control import control
from understudy.commands.doctor import doctor
from understudy.commands.fetch import fetch
from understudy.commands.inspect import inspect
from understudy.commands.lab import lab
from understudy.commands.memory import memory
from understudy.commands.ps import down, ps
from understudy.commands.run import run
from understudy.commands.top import top
from understudy.commands.up import up
from understudy.visible import visible

INTERRUPTED: Final = 130  # as shells say it: 128 and SIGINT

# Typer ships its own copy of click or uses click itself, by version: ask it for the class.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="understudy",
    help="A hypervisor for x86 that needs no root, no KVM and no set-up.",
    epilog="First steps:  understudy run --guest hello   |   understudy doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Ended(NamedTuple):
    """What a command itself returned: a number is Typer's, which says nothing of interrupts."""

    status: int


def _ending(command: Callable[..., int | None]) -> Callable[..., _Ended]:
    @functools.wraps(command)
    def carry_out(*arguments: object, **options: object) -> _Ended:
        return _Ended(command(*arguments, **options) or 0)

    return carry_out


for _command in (
    run, fetch, doctor, lab, control, inspect, up, ps, top, memory, console, down,
):  # fmt: skip
    app.command()(_ending(_command))


def installed_version() -> str:
    """The version of the installed package."""
    try:
        return version("understudy")
    except PackageNotFoundError:
        return "(not installed: run from its sources)"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"understudy {installed_version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A hypervisor for x86 that needs no root, no KVM and no set-up."""


def _open_streams() -> None:
    """Have something behind each standard stream, also where whoever started us closed it.

    Python leaves `sys.stdout` None then, and the next file that is opened gets the number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the status for the shell."""
    _open_streams()
    try:
        ended = app(list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()  # a full disk is to be noticed here, not when Python ends
    except Refusal as refusal:
        return _complain(str(refusal), refusal.status, refusal.detail)
    except _UsageError as error:
        return _complain(_usage_line(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _give_up_output()  # whoever read our output has gone
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except OSError as error:
        _give_up_output()
        return _complain(_os_error_line(error), 1)
    except typer.Abort:
        return _complain("stopped", 1)
    except BaseException as bug:  # a Rust panic is no Exception
        return _complain(_report(bug), 1)
    if isinstance(ended, _Ended):
        return ended.status
    return _complain("interrupted", INTERRUPTED) if ended == INTERRUPTED else int(ended or 0)


def _give_up_output() -> None:
    """If standard output takes no more, Python must not try to flush it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str, status: int, detail: str = "") -> int:
    text = visible(" ".join(line.split()))
    with suppress(OSError):  # nowhere to say it: the status is left
        print(f"understudy: {text}", file=sys.stderr)
        if detail:
            print(visible(detail.rstrip()), file=sys.stderr)
        sys.stderr.flush()
    return status


def _usage_line(error: Exception) -> str:
    """What was wrong, and where help is, in one line."""
    said = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "understudy")
    return f"{said.rstrip('.')} (see {path} --help)" if said.strip() else f"see {path} --help"


def _os_error_line(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _report(bug: BaseException) -> str:
    """Save what is needed to find a bug of ours; returns the line for the user."""
    text = "\n".join(
        [
            f"understudy {installed_version()}, Python {platform.python_version()}",
            f"{platform.platform()}",
            f"arguments: {sys.argv[1:]!r}",
            time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "",
            "".join(traceback.format_exception(bug)),
        ]
    )
    summary = f"{type(bug).__name__}: {str(bug)[:120]}"
    for folder in (_state_directory(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(".txt", time.strftime("crash-%Y%m%d-%H%M%S-"), folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            continue
        return f"a bug in understudy itself ({summary}); the report to send is {name}"
    return f"a bug in understudy itself ({summary}); no report could be saved"


def _state_directory() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local/state") / "understudy"
