"""`understudy control`.

What: asks or tells a running VM something through its control socket.  Source: none.
Invariant: standard output carries the answer and nothing else.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from understudy.commands import Refusal
from understudy.plug import kind_of, parse
from understudy.state import plain
from understudy.visible import visible

# What can be said, and what belongs to it: (the request's word, its help name, must it be there).
WORDS: dict[str, tuple[str, str, bool] | None] = {
    "status": None,
    "counts": None,
    "describe": None,
    "paging": ("to", "TECHNIQUE", False),
    "execution": ("to", "TECHNIQUE", False),
    "plug": ("what", "disk=FILE|net=KIND|share=FOLDER", True),
    "unplug": ("what", "NAME", True),
    "save": ("file", "FILE", True),
    "stop": None,
}
# And to a VM of a host.
OF_HOST: dict[str, tuple[str, str, bool] | None] = {
    "weight": ("to", "NUMBER", False),
    "cap": ("to", "NUMBER", False),
    "pool": ("to", "NAME", False),
    "pause": None,
    "resume": None,
    "down": None,
}
NUMBERS = ("weight", "cap")


def control(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|SOCKET", help="A VM of a host, or what run --control got."),
    ],
    word: Annotated[
        str, typer.Argument(metavar="|".join(WORDS | OF_HOST), help="What to ask for, or to do.")
    ] = "status",
    what: Annotated[
        str | None,
        typer.Argument(metavar="[VALUE]", help="What belongs to some of them."),
    ] = None,
) -> None:
    """Ask or tell a running VM something.

    status: what runs and how far it is.  counts: what was counted, as JSON.  describe: the
    registers.  paging, execution: the technique, or, with a name, another from now on; the guest
    notices nothing.  plug: put a disk, a network card or a folder into a VM that has --hotplug, as
    run takes them.  unplug: ask the guest to give one up.  save: write a snapshot.  stop: end the
    VM.

    Of a host that understudy up has started: weight, cap (a number, or none), pool: the value, or
    another from now on.  pause, resume.  down: have the guest power itself off.

    Examples:

      understudy run --guest cloud-amd64 --control vm.sock

      understudy control vm.sock status

      understudy control vm.sock paging ept

      understudy control vm.sock plug disk=data.img,name=data

      understudy control vm.sock unplug data

      understudy control vm.sock save vm.snapshot

      understudy control web weight=4
    """
    word, is_set, value = word.partition("=")
    if is_set and what is not None:
        raise typer.BadParameter(f"{word}={value} takes nothing more, got {what!r}")
    request = _request(word, value if is_set else what)
    from understudy.control import ControlError, hosts

    try:
        target = hosts.named(name)
        if target.vm is None and word in OF_HOST:
            raise ControlError(f"{word}: {name} is a VM of its own; expected one of a host")
        answer = target.ask(request)
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    typer.echo(visible(answer if isinstance(answer, str) else _shown(word, answer)))


def _request(word: str, what: str | None) -> dict[str, Any]:
    words = WORDS | OF_HOST
    if word not in words:
        raise typer.BadParameter(f"{word!r}: expected one of {', '.join(words)}")
    takes = words[word]
    if takes is None:
        if what is not None:
            raise typer.BadParameter(f"{word} takes nothing more, got {what!r}")
        return {"do": word}
    name, shown, is_needed = takes
    if what is None:
        if is_needed:
            raise typer.BadParameter(
                f"{word} needs a {shown}: understudy control NAME {word} {shown}"
            )
        return {"do": word}
    if word == "plug":
        return {"do": word} | _plugged(what)
    if word == "save":
        what = str(Path(what).absolute())  # the VM may run in another folder
    return {"do": word, name: _number(word, what) if word in NUMBERS else what}


def _plugged(what: str) -> dict[str, Any]:
    """Read here: files are in this folder, and the VM may run in another."""
    try:
        one = parse(what)
    except ValueError as problem:
        raise typer.BadParameter(f"plug: {problem}") from None
    return {kind_of(one): plain(one)}


def _number(word: str, text: str) -> float | None:
    if word == "cap" and text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{word}: expected a number, got {text!r}") from None


def _shown(word: str, answer: Any) -> str:
    match word:
        case "status":
            seconds = answer["guest_ns"] / 1e9
            return (
                f"{answer['name']}: guest time {seconds:.2f} s ({answer['clock']}), "
                f"{answer['instructions']:,} instructions, "
                f"execution {answer['execution']}, paging {answer['paging']}"
            )
        case "save":
            return f"{answer['file']}: {answer['bytes']:,} bytes"
        case _:
            return json.dumps(answer, indent=2, sort_keys=True)
