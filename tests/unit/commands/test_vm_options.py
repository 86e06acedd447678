"""The command line's options of a machine are the fields of its Config."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer

from understudy.commands import vm_options
from understudy.commands.vm_options import Said, with_vm_options
from understudy.config import Config, option, option_of


def said(*arguments: str) -> Said:
    """What a command gets for these arguments."""
    got: list[Said] = []

    @with_vm_options
    def command(
        *,
        before: Annotated[int, typer.Option()] = 1,
        said: Said,
        after: Annotated[int, typer.Option()] = 2,
    ) -> None:
        assert (before, after) == (1, 2)
        got.append(said)

    app = typer.Typer()
    app.command()(command)
    app(list(arguments), standalone_mode=False)
    (found,) = got
    return found


def test_only_what_was_said_is_there() -> None:
    assert said() == {}
    assert said("--clock", "wall", "-m", "64M") == {"clock": "wall", "memory": "64M"}


def test_each_field_with_a_name_is_an_option() -> None:
    for one in fields(Config):
        for name in option_of(one).names:
            if isinstance(one.default, bool):
                assert said(name) == {one.name: not one.default}
            else:
                text = {"net": "lan=a", "publish": "80:80"}.get(one.name, "1M")
                value = option_of(one).read(text)
                expected = (value,) if option_of(one).is_many else value
                assert said(name, text) == {one.name: expected}


def test_what_cannot_be_read_names_the_option() -> None:
    with pytest.raises(typer.BadParameter, match="--memory: expected a size like 256M"):
        said("--memory", "256")


def test_a_new_option_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(what: str, value: int) -> int:
        if value > 7:
            raise ValueError(f"{what} {value}: expected 0 to 7")
        return value

    @dataclass(frozen=True)
    class More(Config):
        color: int = option(1, "Its color.", "--color", read=int, check=check)
        sound: bool = option(True, "Be silent.", "--no-sound", check=lambda what, value: value)

    monkeypatch.setattr(vm_options, "Config", More)
    given: dict[str, Any] = said("--color", "3", "--no-sound")
    assert given == {"color": 3, "sound": False}
    assert More.of(**given).color == 3
    with pytest.raises(ValueError, match="color 8: expected 0 to 7"):
        More.of(**said("--color", "8"))
