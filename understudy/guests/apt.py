"""The computer's own package client, used without changing the computer.

apt-get runs with a private state folder: its own package lists, its own (empty) status file, its
own download folder, and none of the system's hooks.  It reads the system's package sources and
trusted keys, so what it downloads is verified as any package of this computer is.
Source: apt.conf(5), apt-get(8), sources.list(5), and apt's doc/progress-reporting.md.
Invariants: nothing outside the state folder is written; no user id but our own is needed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from understudy.guests.cache import disk_full, explained
from understudy.guests.entry import GuestError

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1, None if unknown)."""

USUAL = "amd64"  # the architecture of the computers that understudy runs on
ONLY_OURS = "understudy.sources"  # in place of the system's sources, not beside them
POCKETS = ("", "updates", "security")  # of a release, in the names of its suites
FRESH_SECONDS = 600  # package lists younger than this are not fetched again

CONFIGURATION = """\
#clear APT::Update;
#clear APT::Architectures;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::CNF;
#clear DPkg;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
APT::Get::List-Cleanup "true";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Dir::State "{state}";
Dir::State::lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
Dir::Cache::archives "{state}/cache/archives";
Dir::Log "{state}";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"""

UNREACHABLE = re.compile(
    r"resolv|could not connect|connection|network|timed out|unable to connect|failed to fetch", re.I
)
INSTALLED = re.compile(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", re.M)
FULL = re.compile(r"no space left|enough free space|disk quota|error writing to", re.I)


class Needed(NamedTuple):
    """A package that would be installed."""

    name: str
    version: str

    @property
    def file(self) -> str:
        """How apt calls its file, up to the architecture."""
        return f"{self.name}_{self.version.replace(':', '%3a')}"


class Apt:
    """One private state folder, for one architecture, with or without the backports suites.

    release: of Debian's releases that one alone, by its name, and nobody else's packages.
    """

    def __init__(
        self, state: Path, architecture: str, *, backports: bool = False, release: str = ""
    ) -> None:
        self.state, self.architecture, self.backports = state, architecture, backports
        self.release = release
        self.trouble: GuestError | None = None
        self.programs = {name: self._program(name) for name in ("apt-get", "apt-cache")}
        with explained(state):
            (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
            (state / "status").touch()
            self.configuration = state / "apt.conf"
            self.parts = state / "sources.list.d"
            self._configure()

    def _configure(self) -> None:
        """Write apt's configuration."""
        text = CONFIGURATION.format(architecture=self.architecture, state=_quoted(self.state))
        if self.parts.is_dir():  # sources of our own
            text += f'Dir::Etc::sourceparts "{_quoted(self.parts)}";\n'
        if (self.parts / ONLY_OURS).exists():
            text += 'Dir::Etc::sourcelist "/dev/null";\n'
        self.configuration.write_text(text)

    def update(self, progress: Progress) -> None:
        """Fetch the package lists, unless that was done minutes ago.

        One list out of many may fail and the others do: so a failure is only kept, in `trouble`,
        for the caller to raise when the package it wants is in none.
        """
        stamp = self.state / "updated"
        if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < FRESH_SECONDS:
            return
        stamp.unlink(missing_ok=True)
        fetch = (["apt-get", "update"], "Fetching package lists", progress, self.state)
        try:
            if self.backports:
                self._add_backports(progress)
            if self.release:
                self._keep_to_release(progress)
            self._run(*fetch)
            if self.architecture != USUAL and not self._targets():
                self._widen(progress)
                self._run(*fetch)
        except GuestError as error:
            self.trouble = error
            return
        with explained(self.state):
            stamp.touch()

    def names(self, prefix: str) -> list[str]:
        """The packages whose names begin so."""
        command = ["apt-cache", "pkgnames", prefix]
        return self._run(command, f"Looking for {prefix}", None, self.state).split()

    def suites(self) -> list[str]:
        """The suites of the package sources, for messages."""
        return sorted({target[1] for target in self._targets()})

    def download(self, package: str, folder: Path, progress: Progress) -> Path:
        """Download one package, verified by apt against its signed lists."""
        try:
            self._run(["apt-get", "download", package], f"Downloading {package}", progress, folder)
        except GuestError:
            (self.state / "updated").unlink(missing_ok=True)  # the lists may be out of date
            raise
        found = sorted(folder.glob("*.deb"))
        if len(found) != 1:
            raise GuestError(f"apt-get downloaded {len(found)} packages for {package}, expected 1")
        return found[0]

    def download_with_needs(
        self,
        names: Sequence[str],
        folder: Path,
        progress: Progress,
        installed: Path | None = None,
    ) -> list[Path]:
        """Download packages and all that they depend on; what is there already is not fetched.

        `installed` is a status file of dpkg's; without one nothing is installed.
        """
        with explained(self.state):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "install", "--yes", "--download-only", "--no-install-recommends"]
        command += ["-o", f"Dir::Cache::archives={_quoted(folder)}", *_status(installed), *names]
        shown = names[0] if len(names) == 1 else f"{len(names)} packages"
        try:
            self._run(command, f"Downloading {shown} and what it needs", progress, folder)
        except GuestError:
            (self.state / "updated").unlink(missing_ok=True)  # the lists may be out of date
            raise
        found = sorted(folder.glob("*.deb"))
        there = {path.name.partition("_")[0] for path in found}
        wanted = [name for name in names if installed is None and not name.startswith("?")]
        if missing := [name for name in wanted if name not in there]:
            raise GuestError(
                f"apt-get downloaded {len(found)} packages, but not {', '.join(missing)}"
            )
        return found

    def needs(self, names: Sequence[str], installed: Path | None = None) -> list[Needed]:
        """The packages that would be installed for these, in apt's order."""
        command = ["apt-get", "install", "--yes", "--simulate", "--no-install-recommends"]
        command += [*_status(installed), *names]
        text = self._run(command, "Looking for what packages need", None, self.state)
        return [Needed(*found) for found in INSTALLED.findall(text)]

    def sources(self) -> str:
        """The package sources that it was given in place of the system's, as sources.list(5)."""
        return (self.parts / ONLY_OURS).read_text()

    def _targets(self) -> list[list[str]]:
        """[uri, suite, component, entry in the sources] of each package list that was fetched."""
        form = "$(ARCHITECTURE)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SOURCESENTRY)"
        command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
        lines = self._run(command, "Reading the package sources", None, self.state).splitlines()
        rows = [line.split("|") for line in lines if line.count("|") == 4]
        return [row[1:] for row in rows if row[0] == self.architecture]

    def _usual_targets(self, progress: Progress) -> list[list[str]]:
        """Those of the system's sources as they are."""
        usual = Apt(self.state.with_name("apt"), USUAL)
        usual.update(progress)
        return usual._targets()

    def _add_backports(self, progress: Progress) -> None:
        """Give apt the system's sources and, from the same place, the release's backports."""
        release = codename()
        targets = self._usual_targets(progress)
        if any(target[1] == f"{release}-backports" for target in targets):
            return
        for uri, suite, component, entry in targets:
            if release and suite == release and component == "main":
                stanza = _stanza(uri, f"{release}-backports", "main", entry)
                self._use({"understudy-backports.sources": stanza}, with_systems=True)
                return

    def _keep_to_release(self, progress: Progress) -> None:
        """Of the system's sources those of Debian, and of those this release's."""
        own, stanzas = codename(), list[str]()
        for uri, suite, component, entry in self._usual_targets(progress):
            name, _, pocket = suite.partition("-")
            if own and name == own and pocket in POCKETS:
                wanted = self.release + suite.removeprefix(own)
                stanzas.append(_stanza(uri, wanted, component, entry))
        if not stanzas:
            raise GuestError(
                f"this computer's package sources are not Debian's: {self.release} cannot be had "
                "from them"
            )
        self._use({ONLY_OURS: "\n".join(stanzas)}, with_systems=False)

    def _widen(self, progress: Progress) -> None:
        """The system's sources are for its own architecture alone: the same ones, for this one."""
        stanzas = [
            _stanza(uri, suite, component, entry, self.architecture)
            for uri, suite, component, entry in self._usual_targets(progress)
        ]
        self._use({ONLY_OURS: "\n".join(stanzas)}, with_systems=False)

    def _use(self, sources: dict[str, str], *, with_systems: bool) -> None:
        """Have apt read these sources, with or without the system's."""
        with explained(self.state):
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir()
            for source in sorted(Path("/etc/apt/sources.list.d").glob("*")) if with_systems else ():
                (self.parts / source.name).symlink_to(source)
            for name, text in sources.items():
                (self.parts / name).write_text(text)
            self._configure()

    def _run(self, command: list[str], what: str, progress: Progress | None, folder: Path) -> str:
        """Run a program of apt; returns its output, or raises GuestError with its reason."""
        arguments = [self.programs[command[0]], "-q", "-c", str(self.configuration)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "APT_"))}
        environment |= {"LC_ALL": "C", "LANGUAGE": "C", "DEBIAN_FRONTEND": "noninteractive"}
        status_out, status_in = os.pipe()
        if progress is not None:
            progress(what, None)
            arguments += ["-o", f"APT::Status-Fd={status_in}"]
        try:
            with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
                process = subprocess.Popen(
                    arguments + command[1:],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    pass_fds=(status_in,),
                    env=environment,
                    cwd=folder,
                )
                try:
                    os.close(status_in)
                    status_in = -1
                    with os.fdopen(status_out, errors="replace") as lines:
                        status_out = -1
                        _follow(lines, what, progress)
                    process.wait()
                finally:
                    if process.poll() is None:
                        process.terminate()
                        process.wait()
                output.seek(0)
                errors.seek(0)
                text = output.read().decode(errors="replace")
                if process.returncode != 0:
                    reason = errors.read().decode(errors="replace")
                    raise GuestError(self._explain(what, reason + text, process.returncode))
                return text
        except OSError as error:
            raise GuestError(f"{what}: cannot run {arguments[0]}: {error}") from None
        finally:
            for descriptor in (status_in, status_out):
                if descriptor >= 0:
                    os.close(descriptor)

    def _explain(self, what: str, output: str, status: int) -> str:
        """apt's errors as one line."""
        said = [line[2:].strip() for line in output.splitlines() if line.startswith(("E:", "W:"))]
        reason = said[0] if said else f"status {status}"
        if any(FULL.search(line) for line in said):
            return f"{what}: {disk_full(self.state)}"
        if any("hash sum" in line.lower() for line in said):
            return f"{what}: the download is damaged ({reason}): try again"
        if any("mirror sync in progress" in line.lower() for line in said):
            return f"{what}: a package source is just being renewed: try again in some minutes"
        if any(UNREACHABLE.search(line) for line in said):
            return (
                f"{what}: the computer's package sources cannot be reached ({reason}) and there "
                "is no copy in the cache: connect to the network and try again, "
                "or use the built-in guest hello"
            )
        return f"{what}: apt failed ({reason})"

    @staticmethod
    def _program(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            raise GuestError(
                f"fetching needs {name}, the package client of Debian, which this computer does "
                "not have: use a kernel file of your own, or the built-in guest hello"
            )
        return path


def _follow(lines: Iterable[str], what: str, progress: Progress | None) -> None:
    """Turn apt's status lines ("dlstatus:number:percent:text") into progress."""
    for line in lines:
        fields = line.split(":", 3)
        if progress is not None and fields[0] == "dlstatus" and len(fields) == 4:
            try:
                progress(what, min(float(fields[2]) / 100, 1.0))
            except ValueError:
                continue


def _status(installed: Path | None) -> list[str]:
    """apt's option for what is installed."""
    return [] if installed is None else ["-o", f"Dir::State::status={_quoted(installed)}"]


def codename() -> str:
    """The name of this computer's release, as its sources call it."""
    for file in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        if file.is_file():
            found = re.search(r'^VERSION_CODENAME="?([a-z]+)', file.read_text(), re.M)
            return found.group(1) if found else ""
    return ""


def _stanza(uri: str, suite: str, component: str, entry: str, architecture: str = "") -> str:
    """A source as sources.list(5) describes it, signed by the key of another entry (FILE:LINE)."""
    lines = ["Types: deb", f"URIs: {uri}", f"Suites: {suite}", f"Components: {component}"]
    if architecture:
        lines.append(f"Architectures: {architecture}")
    file = Path(entry.rpartition(":")[0])
    text = file.read_text(errors="replace") if file.is_file() else ""
    if found := re.search(r"signed-by[:=]\s*(/[^\s\]]+)", text, re.I):
        lines.append(f"Signed-By: {found.group(1)}")
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """A path for apt.conf, whose strings have no escape for a quotation mark."""
    text = str(path.absolute())
    if re.search(r'["\n\\]', text):
        raise GuestError(f"apt cannot work in {text}: set XDG_CACHE_HOME to a plainer path")
    return text
