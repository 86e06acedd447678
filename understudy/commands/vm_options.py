"""The command line's options that are a virtual machine's: made from the fields of `Config`.

What: `with_vm_options` puts an option for each field that has a name on the command line in the
place of a command's parameter `said`, and gives the command what the user said, by field.
Source: `understudy.config`.
Invariant: what the user did not say is not in `said`, so that a command may have a default of its
own; what cannot be read is a line that begins with the option's name.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from understudy.config import Config, Option, option_of

Said = dict[str, Any]
"""What the user said of the machine: values for `Config`, by the names of its fields."""


def with_vm_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in the place of its parameter `said`."""
    rows = {one.name: one for one in fields(Config) if option_of(one).names}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        texts = {name: given.pop(name) for name in rows}
        command(said=_read(rows, texts), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "said":
            parameters += [_parameter(one) for one in rows.values()]
        else:
            parameters.append(parameter)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
    return wrapped


def _parameter(one: "Field[Any]") -> inspect.Parameter:
    """A field as Typer wants to see it."""
    option = option_of(one)
    annotation: Any
    default: bool | None
    kind: Any = list[str] if option.is_many else str
    if _is_switch(one):
        shown = typer.Option(*option.names, help=option.words)
        annotation, default = Annotated[bool, shown], False
    else:
        shown = typer.Option(
            *option.names, help=_words(one), metavar=option.metavar, show_default=False
        )
        annotation, default = Annotated[kind | None, shown], None
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, kind, default=default, annotation=annotation)


def _is_switch(one: "Field[Any]") -> bool:
    return isinstance(one.default, bool)


def _words(one: "Field[Any]") -> str:
    """The words of help, with the default if they do not speak of one."""
    words = option_of(one).words
    return (
        words if "Default:" in words or one.default == () else f"{words}  Default: {one.default}."
    )


def _read(rows: "dict[str, Field[Any]]", texts: dict[str, Any]) -> Said:
    """What was said, in the types of the fields."""
    said: Said = {}
    for name, text in texts.items():
        one, option = rows[name], option_of(rows[name])
        if _is_switch(one):
            if text:
                said[name] = not one.default
        elif text is not None and text != []:
            said[name] = (
                tuple(_value(option, one) for one in text)
                if option.is_many
                else _value(option, text)
            )
    return said


def _value(option: Option, text: str) -> Any:
    try:
        return option.read(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option.names[0]}: {error}") from None
