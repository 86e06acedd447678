"""What a boot loader's configuration says is to be started: kernel, initrds, command line.

    extlinux.conf                   the EXTLINUX of Syslinux, and U-Boot
    loader/entries/*.conf           the Boot Loader Specification, type 1
    grub.cfg                        what grub-mkconfig writes: GRUB's language is not run

Source: Syslinux, doc/syslinux.txt; the UAPI group's Boot Loader Specification; the GRUB manual,
"Writing full configuration files directly".
Invariant: text may come from anybody; whatever it says, the result is paths and words, or None.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SET = re.compile(r"\s*set\s+(\w+)=(\S.*|)")
_LINUX = ("linux", "linux16", "linuxefi")
_INITRD = ("initrd", "initrd16", "initrdefi")
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class BootEntry:
    """What is to be started; paths are those of the file system that has the configuration."""

    kernel: str
    initrds: tuple[str, ...]
    append: str


def extlinux(text: str, folder: str) -> BootEntry | None:
    """The default of an extlinux.conf, which lies in `folder`."""
    labels: dict[str, dict[str, str]] = {}
    default, here, above = "", None, dict[str, str]()
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match word.lower():
            case "default":
                default = rest
            case "label":
                here = labels.setdefault(rest, {})
            case ("kernel" | "linux" | "initrd" | "append") as key:
                (above if here is None else here)["kernel" if key == "linux" else key] = rest
    chosen = labels.get(default) or next(iter(labels.values()), None)
    if chosen is None or not chosen.get("kernel"):
        return None
    chosen = above | chosen
    initrds, words = chosen.get("initrd", "").replace(",", " ").split(), []
    for one in chosen.get("append", "").split():
        if one.startswith("initrd="):
            initrds += one.removeprefix("initrd=").split(",")
        else:
            words.append(one)
    paths = [str(PurePosixPath(folder, one)) for one in (chosen["kernel"], *initrds)]
    return BootEntry(paths[0], tuple(paths[1:]), " ".join(words))


def specified(files: Mapping[str, str], settings: str = "") -> BootEntry | None:
    """The entry that the Boot Loader Specification has started, of these files by their names.

    settings: what is in loader.conf, whose default is a name, or a pattern as for files.
    """
    wanted = next(
        (line.split()[1] for line in settings.splitlines() if re.match(r"default\s+\S", line)), ""
    )
    names = sorted(files, key=_by_version, reverse=True)
    chosen = [
        n for n in names if fnmatchcase(n, wanted) or fnmatchcase(n.removesuffix(".conf"), wanted)
    ]
    for name in chosen + names:
        values: dict[str, list[str]] = {}
        for line in files[name].splitlines():
            key, _, value = line.strip().partition(" ")
            values.setdefault(key, []).append(value.strip())
        if values.get("linux") and "$" not in "".join(values.get("options", [])):
            initrds = " ".join(values.get("initrd", [])).split()
            return BootEntry(
                values["linux"][0], tuple(initrds), " ".join(values.get("options", []))
            )
    return None


def grub(text: str) -> BootEntry | None:
    """The default of a grub.cfg; the first entry if it says none that can be told from the text."""
    variables: dict[str, str] = {}
    entries: list[tuple[list[str], BootEntry]] = []
    for names, lines in _menu(text, variables):
        kernel, initrds, append = "", list[str](), ""
        for line in lines:
            words = _words(line, variables)
            if len(words) > 1 and words[0] in _LINUX:
                kernel, append = words[1], " ".join(words[2:])
            elif words and words[0] in _INITRD:
                initrds += words[1:]
        if kernel:
            entries.append((names, BootEntry(kernel, tuple(initrds), append)))
    if not entries:
        return None
    default = variables.get("default", "0").split(">")[-1]
    if default.isdigit() and int(default) < len(entries):
        return entries[int(default)][1]
    return next((entry for names, entry in entries if default in names), entries[0][1])


def _menu(text: str, variables: dict[str, str]) -> Iterator[tuple[list[str], list[str]]]:
    """(title and id, lines) of each entry of the menu; sets variables on the way."""
    names: list[str] = []
    inside: list[str] | None = None
    for line in text.splitlines():
        found = _SET.fullmatch(line)
        if found and "${" not in found[2] and "$(" not in found[2]:
            variables[found[1]] = (_words(found[2], variables) or [""])[0]
        elif line.lstrip().startswith("menuentry "):
            words = _words(line, variables)
            names = [word for word in words[1:] if word not in ("{", "--class", "--id")]
            inside = []
        elif inside is not None and line.strip() == "}":
            yield names, inside
            inside = None
        elif inside is not None:
            inside.append(line)


def _words(line: str, variables: Mapping[str, str]) -> list[str]:
    """As a shell would split it, more or less."""
    text = _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), line)
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split()


def _by_version(name: str) -> list[tuple[int, str]]:
    """Numbers in a name compare as numbers."""
    parts = _NUMBERS.split(name)
    return [(int(one), "") if one.isdigit() else (-1, one) for one in parts]
