"""`understudy control`.

What: asks or tells a running VM something through its control socket.  Source: none.
Invariant: standard output carries the answer and nothing else.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from understudy.commands import Refusal
from understudy.visible import visible

# What can be said, and what belongs to it: (the request's word, its help name, must it be there).
WORDS: dict[str, tuple[str, str, bool] | None] = {
    "status": None,
    "counts": None,
    "describe": None,
    "paging": ("to", "TECHNIQUE", False),
    "save": ("file", "FILE", True),
    "stop": None,
}


def control(
    socket: Annotated[Path, typer.Argument(metavar="SOCKET", help="What run --control was given.")],
    word: Annotated[
        str, typer.Argument(metavar="|".join(WORDS), help="What to ask for, or to do.")
    ] = "status",
    what: Annotated[
        str | None, typer.Argument(metavar="[TECHNIQUE|FILE]", help="For paging and save.")
    ] = None,
) -> None:
    """Ask or tell a running VM something.

    status: what runs and how far it is.  counts: what was counted, as JSON.  describe: the
    registers.  paging: the paging technique, or, with a name, another from now on; the guest
    notices nothing.  save: write a snapshot.  stop: end the VM.

    Examples:

      understudy run --guest cloud-amd64 --control vm.sock

      understudy control vm.sock status

      understudy control vm.sock paging ept

      understudy control vm.sock save vm.snapshot
    """
    request = _request(word, what)
    from understudy.control import ControlError, ask

    try:
        answer = ask(socket, request)
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    typer.echo(visible(answer if isinstance(answer, str) else _shown(word, answer)))


def _request(word: str, what: str | None) -> dict[str, Any]:
    if word not in WORDS:
        raise typer.BadParameter(f"{word!r}: expected one of {', '.join(WORDS)}")
    takes = WORDS[word]
    if takes is None:
        if what is not None:
            raise typer.BadParameter(f"{word} takes nothing more, got {what!r}")
        return {"do": word}
    name, shown, is_needed = takes
    if what is None:
        if is_needed:
            raise typer.BadParameter(
                f"{word} needs a {shown}: understudy control SOCKET {word} {shown}"
            )
        return {"do": word}
    if word == "save":
        what = str(Path(what).absolute())  # the VM may run in another folder
    return {"do": word, name: what}


def _shown(word: str, answer: Any) -> str:
    match word:
        case "status":
            seconds = answer["guest_ns"] / 1e9
            return (
                f"{answer['name']}: guest time {seconds:.2f} s ({answer['clock']}), "
                f"{answer['instructions']:,} instructions, paging {answer['paging']}"
            )
        case "save":
            return f"{answer['file']}: {answer['bytes']:,} bytes"
        case _:
            return json.dumps(answer, indent=2, sort_keys=True)
