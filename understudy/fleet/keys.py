"""What may stand in a file of hosts: each key with its words, its form, and how it is read.

The keys of a VM are the long names of the options of `understudy run`, made from the fields of
`Config`; those that only a VM of a host has stand here.

Source: ours; docs/decisions/0061-a-hosts-file-speaks-as-the-command-line.md.
Invariant: what `read` returns is right in itself; else ValueError says what was expected.
"""

import re
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Final

from understudy.config import Config, Option, option_of
from understudy.guests import debian, teaching
from understudy.guests.cache import Cache
from understudy.guests.release import RELEASES
from understudy.overcommit.victims import Victims
from understudy.quantities import parse_size, parse_span
from understudy.sched.host import MOST
from understudy.sched.policy import Policy
from understudy.sched.seat import portion

OF_HOST: Final = ("engine", "clock")
"""Fields of `Config` that all VMs of a host have in common."""
LONGEST_NAME: Final = 40
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Key:
    """One key of a table."""

    name: str
    words: str
    form: str
    """What the value looks like."""
    read: Callable[[Any], Any]
    field: str = ""
    """Of `Config`, if it is one of its."""


# --- forms of values ---


def text(value: Any) -> str:
    """A text that is not empty."""
    if type(value) is not str or not value.strip() or "\0" in value:
        raise ValueError(f"expected a text, got {value!r}")
    return value


def named(value: Any) -> str:
    """A name that can also be one of a file."""
    if type(value) is not str or not _NAME.fullmatch(value) or len(value) > LONGEST_NAME:
        raise ValueError(
            f"expected a name of at most {LONGEST_NAME} letters, digits and ._+-, got {value!r}"
        )
    return value


def _pcpus(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"expected a number of pCPUs, 1 to {MOST}, got {value!r}")
    return value


def _policy(value: Any) -> str:
    if text(value) not in Policy.ALL and not Path(value).is_file():
        known = ", ".join(sorted(Policy.ALL))
        raise ValueError(f"expected one of {known}, or the path of a file, got {value!r}")
    return value if value in Policy.ALL else str(Path(value).absolute())


def _victims(value: Any) -> str:
    if text(value) not in Victims.ALL and not Path(value).is_file():
        known = ", ".join(sorted(Victims.ALL))
        raise ValueError(f"expected one of {known}, or the path of a file, got {value!r}")
    return value if value in Victims.ALL else str(Path(value).absolute())


def _pages(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number of pages, got {value!r}")
    return value


def _shares(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a number of shares, got {value!r}")
    return value


def _file(value: Any) -> Path:
    if not Path(text(value)).is_file():
        raise ValueError(f"expected a file, and {value!r} is none")
    return Path(value).absolute()


def _guest(value: Any) -> str:
    if value not in debian.NAMES:
        raise ValueError(f"expected one of {', '.join(debian.NAMES)}, got {value!r}")
    if value in teaching.GUESTS and teaching.GUESTS[value].kind == "pv":
        raise ValueError(f"{value} is paravirtual, and needs a processor that no other VM shares")
    item = RELEASES[value].item if value in RELEASES else value
    if value not in debian.BUILT_IN and not Cache().has(item):
        raise ValueError(f"{value} is not fetched: understudy fetch {value}")
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text(one) for one in (value if type(value) is list else [value]))


def _size(value: Any) -> str:
    parse_size(text(value))
    return str(value)


def _span(value: Any) -> float:
    return parse_span(text(value))


# --- the options of a VM ---


def _is_switch(one: "Field[Any]") -> bool:
    return isinstance(one.default, bool)


def _option_key(one: "Field[Any]") -> Key:
    option = option_of(one)
    name = next(name for name in option.names if name.startswith("--"))[2:]
    form = "true" if _is_switch(one) else option.metavar or "TEXT"
    if option.is_many:
        form += " or a list"
    words = option.words.partition("  Default:")[0]

    def read(value: Any) -> Any:
        if not _is_switch(one):
            found = _said(one, option, value)
        elif type(value) is bool:
            found = bool(one.default) ^ value
        else:
            raise ValueError(f"expected true or false, got {value!r}")
        try:
            return option.check(name, found)
        except ValueError as problem:
            raise ValueError(str(problem).removeprefix(f"{name} ")) from None

    return Key(name, words, form, read, one.name)


def _said(one: "Field[Any]", option: Option, value: Any) -> Any:
    """What the command line would make of it; a number may be one if the default is."""
    if option.is_many:
        return tuple(option.read(text) for text in _texts(value))
    if type(value) is int and type(one.default) is int:
        return value
    return option.read(text(value))


_OPTIONS: Final = [_option_key(one) for one in fields(Config) if option_of(one).names]


# --- the tables ---


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


_SCHEDULING: Final = (
    Key("policy", "How its vCPUs share its pCPUs.", "NAME or FILE", _policy),
    Key("slice", "How long a vCPU runs if another waits, for the policy share.", "TIME", _span),
)

HOST: Final = _table(
    Key("name", "What the host is called; else as the file is.", "NAME", named),
    Key("pcpus", "Physical processors.", "N", _pcpus),
    Key("ram", "Memory; else as much as its VMs need.", "SIZE", _size),
    Key(
        "scan",
        "Pages a second that are looked at to be shared, if the VMs have more memory than "
        "the host; 0: nothing is shared.",
        "N",
        _pages,
    ),
    Key("swap", "The swap file, at most; else as much as its VMs may need.", "SIZE", _size),
    Key("victims", "Which page of a VM is swapped out next.", "NAME or FILE", _victims),
    *_SCHEDULING,
    Key("grace", "How long a guest gets to power itself off.", "TIME", _span),
    *(key for key in _OPTIONS if key.field in OF_HOST),
)
"""Of the table `host`; policy and slice are those of the pool "default"."""

POOL: Final = _table(Key("pcpus", "pCPUs that it has.", "N", _pcpus), *_SCHEDULING)
"""Of a table `pools.NAME`."""

VM: Final = _table(
    Key("name", "What the VM is called, if it is one of a list.", "NAME", named),
    Key("guest", "A guest by name: see understudy fetch --list.", "NAME", _guest),
    Key("kernel", "Your own kernel.", "FILE", _file),
    Key("initrd", "Its initial RAM disk.", "FILE", _file),
    Key("append", "Added to the kernel's command line.", "TEXT", text),
    Key("with", "Debian packages to have in the guest.", "PACKAGE or a list", _texts),
    Key("exec", "Run in the guest; then the VM ends.", "COMMAND", text),
    Key("min", "What it always has of its memory, if the VMs have more than the host.", "SIZE",
        _size, "min_memory"),
    Key("shares", "How much it may have of the rest, in relation to others.", "N", _shares,
        "shares"),
    Key("sharing_group", "With whom its pages may become one, if the VMs have more than the host.",
        "NAME", named, "sharing_group"),
    Key("weight", "Its share of the pCPUs, in relation to those of others.", "NUMBER",
        portion),
    Key("cap", "At most so many pCPUs, even if others idle.", "NUMBER", portion),
    Key("pool", "The pool in which it runs.", "NAME", named),
    *(key for key in _OPTIONS if key.field not in OF_HOST),
)  # fmt: skip
"""Of a table `vm.NAME`, or of one of a list `vm`."""
