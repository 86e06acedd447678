"""What one can choose about a virtual machine: one frozen dataclass, one entry a choice.

What: each field of `Config` carries, in its metadata, its check, its words of help and its names on
the command line.  Made from it: the constructor of `VM`, the options of `understudy run`, what
a snapshot says of its VM (`state.plain`, `state.restore`), and the sweeps of the lab
(`dataclasses.replace`).

Source: ours; docs/decisions/0015-one-place-for-the-options.md.
Invariants: a Config that exists is right in itself.  Names that other rooms register (paging and
execution techniques, CPU models) are checked where those rooms are known, by
`assembly.check_names`.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Final, Self

from understudy.arch.address import PAGE
from understudy.arch.topology import Topology
from understudy.disk import FORM, Disk
from understudy.lists import Check, DeviceRow, each, names, names_of_devices, rows, texts
from understudy.nic import FORM as NIC_FORM
from understudy.nic import PORT_FORM, Nic, Port
from understudy.quantities import bytes_of, parse_size
from understudy.share import FORM as SHARE_FORM
from understudy.share import Share
from understudy.vsock import FORM as VSOCK_FORM
from understudy.vsock import Vsock

SMALLEST, LARGEST = 1 << 20, 1 << 38
LARGEST_ROM, ROM_UNIT = 1 << 24, 1 << 16  # down to the I/O APIC's and local APIC's neighbourhood
MOST_DISKS, MOST_NICS, MOST_PORTS = 24, 4, 256  # the first two of the 32 slots of a PCI bus
MOST_FOLDERS: Final = 8
MOST_SHARES: Final = 1_000_000
LONGEST_GROUP: Final = 64
LEAST_TABLES: Final = 2 << 20  # bytes: what one instruction may need at once must fit well
LARGEST_PAGES: Final = {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}


@dataclass(frozen=True)
class Option:
    """What belongs to a field of `Config` beside its type and its default."""

    words: str
    check: Check
    names: tuple[str, ...] = ()
    """On the command line; none: it cannot be said there.  A switch turns its default around."""
    metavar: str | None = None
    read: Callable[[str], Any] = str
    """What the command line's text means; ValueError says what was expected."""
    is_many: bool = False
    """It may be repeated: what was read each time becomes a tuple."""


def option(default: Any, words: str, *names: str, **more: Any) -> Any:
    """A field of `Config`, with its `Option`."""
    return field(default=default, metadata={"option": Option(words, names=names, **more)})


def option_of(one: "Field[Any]") -> Option:
    """The `Option` of a field of `Config`."""
    found = one.metadata["option"]
    assert isinstance(found, Option)
    return found


# --- checks ---


def check_choice(what: str, value: str, known: Iterable[str]) -> str:
    """The value, if it is one of the known names; else ValueError names them."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{what} {value!r}: expected one of {', '.join(sorted(known))}")
    return value


def _one_of(*known: str) -> dict[str, Any]:
    """The check and the metavar of a choice."""
    return {
        "check": lambda what, value: check_choice(what, value, known),
        "metavar": "|".join(known),
    }


def _is(kind: type, words: str) -> Check:
    def check(what: str, value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{what} {value!r}: expected {words}")
        return value

    return check


_text = _is(str, "a text")
_switch = _is(bool, "True or False")


def _pages(least: int, words: str) -> Check:
    def check(what: str, value: int | str) -> int:
        size = bytes_of(value)
        if not least <= size <= LARGEST or size % PAGE:
            raise ValueError(f"{what} {value!r}: expected {words} to {LARGEST >> 30}G, whole pages")
        return size

    return check


_memory, _least = _pages(SMALLEST, f"{SMALLEST >> 20}M"), _pages(0, "0")


def _shares(what: str, value: int) -> int:
    if type(value) is not int or not 1 <= value <= MOST_SHARES:
        raise ValueError(f"{what} {value!r}: expected 1 to {MOST_SHARES:,}")
    return value


def _group(what: str, value: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_GROUP:
        raise ValueError(f"{what} {value!r:.60}: expected a name of up to {LONGEST_GROUP} letters")
    return value


def _size_text(text: str) -> str:
    parse_size(text)
    return text


def _largest_page(what: str, value: int | str) -> str:
    try:
        return LARGEST_PAGES[bytes_of(value)]
    except (KeyError, ValueError):
        raise ValueError(f"{what} {value!r}: expected 4K, 2M or 1G") from None


def _table_memory(what: str, value: int | str) -> int | str:
    if value == "auto":
        return value
    size = bytes_of(value)
    if not LEAST_TABLES <= size <= LARGEST or size % PAGE:
        raise ValueError(
            f"{what} {value!r}: expected auto, or {LEAST_TABLES >> 20}M to {LARGEST >> 30}G, "
            "whole pages"
        )
    return size


def _table_memory_text(text: str) -> str:
    return text if text == "auto" else _size_text(text)


def _cpus(what: str, value: int | str) -> int | str:
    topology = Topology.of(value)
    return topology.count if str(value) == str(topology.count) else value


def _rom(what: str, value: int) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_ROM or value % ROM_UNIT:
        raise ValueError(
            f"{what} {value!r}: expected at most {LARGEST_ROM >> 20} MiB, in units of 64 KiB"
        )
    return value


# --- the options ---


@dataclass(frozen=True)
class Config:
    """The choices for one virtual machine.

    >>> Config(memory="64M", clock="wall").memory
    67108864
    """

    memory: int | str = option(
        "256M", "RAM, like 256M or 1G.", "--memory", "-m",
        metavar="SIZE", read=_size_text, check=_memory,
    )  # fmt: skip
    """Bytes; a text like "256M" becomes bytes."""
    cpus: int | str = option(
        1, "Virtual processors, and how they are grouped, like 4,cores=2,threads=2.",
        "--cpus", metavar="N[,cores=N][,threads=N]", check=_cpus,
    )  # fmt: skip
    """How many, or text with their grouping."""
    clock: str = option(
        "virtual",
        "virtual: time is instructions, every run is the same, idling costs nothing; "
        "wall: real time.  Default: wall at a terminal and with --net user or tap, else virtual.",
        "--clock", **_one_of("virtual", "wall"),
    )  # fmt: skip
    engine: str = option(
        "dbt", "dbt: fast; reference: plain and slow.", "--engine", **_one_of("dbt", "reference")
    )
    virtualizable_isa: bool = option(
        False, "Sensitive instructions trap above CPL 0, which IA-32 does not have: for "
        "--execution deprivileged.", "--virtualizable-isa", check=_switch,
    )  # fmt: skip
    execution: str = option(
        "vmx", "How the guest's code is run; help lists the ways.", "--execution",
        metavar="NAME", check=_text,
    )  # fmt: skip
    keep_translations: bool = option(
        False, "Keep what --execution bt translates in the cache folder, for the next time.",
        "--keep-translations", check=_switch,
    )  # fmt: skip
    exits: tuple[str, ...] = option(
        (), "Have these come to the hypervisor though no guest needs it, like rdtsc,cr3-load; help "
        "lists them.", "--exit", metavar="NAME[,NAME]", read=names, check=texts,
    )  # fmt: skip
    paging: str = option(
        "ept", "How memory is virtualised: ept, or shadow tables; help lists the ways.",
        "--paging", metavar="NAME", check=_text,
    )  # fmt: skip
    largest_page: int | str = option(
        "1G", "The largest page of the EPT: 4K, 2M or 1G.",
        "--largest-page", metavar="SIZE", check=_largest_page,
    )  # fmt: skip
    """As text."""
    table_memory: int | str = option(
        "auto",
        "The most memory for shadow tables and what is noted of them, set aside at the start; "
        "auto: a quarter of the RAM, but at least 8M.",
        "--table-memory", metavar="SIZE", read=_table_memory_text, check=_table_memory,
    )  # fmt: skip
    """Bytes, or "auto"."""
    reboot: bool = option(
        True, "End when the guest resets itself, instead of starting it again.",
        "--no-reboot", check=_switch,
    )  # fmt: skip
    triple_fault: str = option(
        "auto",
        "What a triple fault does.  reset: the guest starts again; stop: it ends, and its state is "
        "shown; auto: a reset if it emptied its interrupt table for that, else stop.",
        "--triple-fault", **_one_of("auto", "reset", "stop"),
    )  # fmt: skip
    cpu: str = option(
        "understudy",
        "The processor that the guest sees: understudy, max or baseline, and features to add or "
        "take away, like max,-smap; help lists them.",
        "--cpu", metavar="MODEL,+FEATURE,-FEATURE", check=_text,
    )  # fmt: skip
    rom: int = option(0, "Bytes of a ROM that ends at 4 GiB, with the reset vector.", check=_rom)
    """With one, the VM has no tables of ours: they are that firmware's business."""
    name: str = option("vm", "What the VM is called.", check=_text)
    devices: tuple[DeviceRow, ...] = option(
        (), "Devices beside those of every board, like testdev, at their usual places.",
        "--device", metavar="NAME[,NAME]", read=names_of_devices, check=rows,
    )  # fmt: skip

    disks: tuple[Disk, ...] = option(
        (), f"A disk, from an image: {FORM}.  May be repeated.", "--disk",
        metavar="FILE[,OPTIONS]", read=Disk.parse, is_many=True,
        check=each(Disk, MOST_DISKS, "disks, or texts like 'FILE,ro'"),
    )  # fmt: skip
    """`Disk`s, or texts as on the command line."""
    snapshot: bool = option(
        False, "Keep what is written to disks in temporary files, and forget it at the end.",
        "--snapshot", check=_switch,
    )  # fmt: skip

    net: tuple[Nic, ...] = option(
        (), f"A network card, and where its cable leads: {NIC_FORM}.  May be repeated.", "--net",
        metavar="user|lan=NAME|tap=NAME[,OPTIONS]", read=Nic.parse, is_many=True,
        check=each(Nic, MOST_NICS, "network cards, or texts like 'user' or 'lan=NAME'"),
    )  # fmt: skip
    """`Nic`s, or texts as on the command line."""
    publish: tuple[Port, ...] = option(
        (), "A port of this computer that leads into the guest, with --net user; of its loopback "
        "if no address is said.  May be repeated.", "--publish",
        metavar=PORT_FORM, read=Port.parse, is_many=True,
        check=each(Port, MOST_PORTS, "ports, or texts like '8080:80'"),
    )  # fmt: skip
    """`Port`s, or texts as on the command line."""

    folders: tuple[Share, ...] = option(
        (), f"A folder of this computer that the guest shares, to read: {SHARE_FORM}; with rw, to "
        "write as well.  It is at MOUNT there, else at /mnt/ and its name.  May be repeated.",
        "--share", metavar="FOLDER[:MOUNT][,rw]", read=Share.parse, is_many=True,
        check=each(Share, MOST_FOLDERS, "shares, or texts like 'FOLDER:/mnt,rw'"),
    )  # fmt: skip
    """`Share`s, or texts as on the command line."""

    vsock: tuple[Vsock, ...] = option(
        (), f"A socket between guest and host, and its path here: {VSOCK_FORM}.", "--vsock",
        metavar="PATH[,cid=N]", read=Vsock.parse, is_many=True,
        check=each(Vsock, 1, "a socket, or a text like 'PATH,cid=3'"),
    )  # fmt: skip
    """`Vsock`s, or texts as on the command line."""

    hide_virtio: tuple[str, ...] = option(
        (), "Features that its virtio devices do not offer, like packed,mq; help lists them.",
        "--hide-virtio", metavar="FEATURE[,FEATURE]", read=names, check=texts,
    )  # fmt: skip
    hotplug: bool = option(
        False,
        "Let disks, network cards and folders come and go while it runs.",
        "--hotplug",
        check=_switch,
    )
    balloon: bool = option(
        False, "Have a balloon, by which the guest gives memory back.", "--balloon", check=_switch
    )
    min_memory: int | str = option(
        0, "On a host whose VMs have more memory than it: what it always has.", check=_least
    )
    """Bytes."""
    shares: int = option(
        1, "On such a host: how much it may have of the rest, in relation to others.",
        check=_shares,
    )  # fmt: skip
    sharing_group: str = option(
        "", "On such a host: with whom its pages may become one.  Those of another group it never "
        "has in common, so that no guest learns from the time of a write what another has.",
        check=_group,
    )  # fmt: skip

    agent: str = option(
        "auto",
        "How commands reach the guest.  virtio: by a virtio console, whose driver the guest gets; "
        "port: by a port of ours; auto: by virtio if the VM has other virtio devices.",
        "--agent",
        **_one_of("auto", "port", "virtio"),
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            kept = option_of(one).check(one.name, getattr(self, one.name))
            object.__setattr__(self, one.name, kept)
        if bytes_of(self.min_memory) > bytes_of(self.memory):
            raise ValueError(
                f"min_memory {self.min_memory}: expected at most its memory, {self.memory}"
            )
        mounts = [share.mount for share in self.folders]
        for mount in mounts:
            if mounts.count(mount) > 1:
                raise ValueError(
                    f"folders: {mounts.count(mount)} of them are to be at {mount}, expected one: "
                    "say FOLDER:MOUNT with another MOUNT"
                )
        for share in self.folders:
            if share.server == "virtiofsd" and self.clock != "wall":
                raise ValueError(
                    f"share {share.folder}: virtiofsd answers when it likes, and a run in virtual "
                    "time has to be the same each time: expected clock wall, or server=python"
                )
            for vsock in self.vsock:
                if share.is_writable and vsock.path and share.has(vsock.path):
                    raise ValueError(
                        f"vsock {vsock.path}: the guest may write to the folder {share.folder}, "
                        "where it is: expected a path outside of it"
                    )
        users = sum(nic.kind == "user" for nic in self.net)
        if users > 1 or (self.publish and not users):
            raise ValueError(
                "publish: expected a card with net user, to which the ports lead" if not users
                else f"net: {users} cards of kind user, expected 1 at most"
            )  # fmt: skip

    @property
    def topology(self) -> Topology:
        """What `cpus` says: how many processors, in which groups."""
        return Topology.of(self.cpus)

    @property
    def has_virtio(self) -> bool:
        """Whether the VM has devices that a guest needs virtio's drivers for."""
        parts = self.disks or self.net or self.folders or self.vsock
        return (
            self.agent == "virtio"
            or bool(parts or self.balloon or self.hotplug)
            or any(name.startswith("virtio_") for name, _ in self.devices)
        )

    @property
    def has_virtio_agent(self) -> bool:
        """Whether the agent may come by a virtio console."""
        return self.has_virtio and self.agent != "port"

    @property
    def is_linked(self) -> bool:
        """Whether others can send it something."""
        return any(nic.kind != "none" for nic in self.net) or bool(self.vsock)

    @property
    def has_outside(self) -> bool:
        """Whether something may come, at any time, from outside of this process.

        Two runs are not the same run then, not in virtual time either.
        """
        return any(nic.kind in ("user", "tap") for nic in self.net) or bool(self.vsock)

    @classmethod
    def of(cls, given: "Self | int | str | None" = None, /, **options: Any) -> Self:
        """From what a user says: nothing, a size of memory or a whole Config, and options."""
        if isinstance(given, Config):
            return replace(given, **options) if options else given
        return cls(**options) if given is None else cls(given, **options)
