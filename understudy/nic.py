"""What one can choose about a network card: what its cable leads to.

    --net user[,host-loopback][,mac=ADDRESS][,rate=SPEED][,pcap=FILE][,name=NAME]
    --net lan=NAME[,mac=ADDRESS][,rate=SPEED][,pcap=FILE][,name=NAME]
    --net tap=NAME[,mac=ADDRESS][,rate=SPEED][,pcap=FILE][,name=NAME]
    --publish [ADDRESS:]PORT:GUESTPORT[/udp]

A comma in a file's name is written twice.  Source: ours; the form is that of `--disk`, and of
Docker's `--publish`.
Invariants: a `Nic` or `Port` that exists is right in itself; whether a port is free is found out
when a VM is made.
"""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from understudy.quantities import parse_rate
from understudy.slot import Slotted

KINDS: Final = ("user", "lan", "tap", "none")
FORM: Final = (
    "user, lan=NAME or tap=NAME, and [,host-loopback][,mac=ADDRESS][,rate=SPEED][,pcap=FILE]"
    "[,name=NAME]"
)
PORT_FORM: Final = "[ADDRESS:]PORT:GUESTPORT[/udp]"
LOOPBACK: Final = "127.0.0.1"
LONGEST_NAME: Final = 40
SLOWEST, FASTEST = 8_000, 10**12  # bit/s
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_INTERFACE: Final = re.compile(r"[!-.0-9;-~]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PORT: Final = re.compile(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")


@dataclass(frozen=True)
class Nic(Slotted):
    """A network card of a VM."""

    kind: str
    """user: what this computer reaches; lan: other VMs of this process; tap: an interface of this
    computer; none: nothing."""
    lan: str = ""
    """The name of the network, of kind lan."""
    mac: str = ""
    """Like 52:54:00:12:34:56; empty: one of its own, locally administered."""
    rate: int = 0
    """The most bit/s, each way; 0: no limit."""
    pcap: str = ""
    """A file for all frames; kept as an absolute path."""
    has_host_loopback: bool = False
    """Whether the gateway's address leads to what listens on this computer's loopback alone."""
    tap: str = ""
    """The name of the interface, of kind tap."""

    def __post_init__(self) -> None:
        for name in ("kind", "lan", "tap", "mac", "pcap"):
            self._check(type(getattr(self, name)) is str, f"{name} as a text")
        self._check(type(self.has_host_loopback) is bool, "has_host_loopback as True or False")
        self._check(self.kind in KINDS, f"one of {', '.join(KINDS)}")
        is_named = bool(_NAME.fullmatch(self.lan)) and len(self.lan) <= LONGEST_NAME
        self._check(
            is_named if self.kind == "lan" else not self.lan,
            f"lan=NAME, of at most {LONGEST_NAME} letters, digits and ._+-",
        )
        is_interface = bool(_INTERFACE.fullmatch(self.tap)) and self.tap not in (".", "..")
        self._check(
            is_interface if self.kind == "tap" else not self.tap,
            "tap=NAME, of an interface of this computer: at most 15 characters, and no / or :",
        )
        self._check(
            not self.has_host_loopback or self.kind == "user", "host-loopback with user alone"
        )
        object.__setattr__(self, "mac", self.mac.lower())
        self._check(
            not self.mac or (bool(_MAC.fullmatch(self.mac)) and _is_one_cards(self.address)),
            "mac= like 52:54:00:12:34:56, of one card (its first number even)",
        )
        is_rate = type(self.rate) is int and (not self.rate or SLOWEST <= self.rate <= FASTEST)
        self._check(is_rate, "rate= of 8K to 1000G bit/s")
        self._check(not self.place_problem, self.place_problem)
        self._check("\0" not in self.pcap, "pcap= with the path of a file")
        if self.pcap:
            object.__setattr__(self, "pcap", str(Path(self.pcap).absolute()))

    @property
    def address(self) -> bytes | None:
        """The MAC address as bytes, if one was chosen."""
        return bytes.fromhex(self.mac.replace(":", "")) if self.mac else None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line's words; ValueError says what was expected."""
        words = [w.replace("\0", ",") for w in re.sub(",,", "\0", text).split(",")]
        kind, _, leads = words[0].partition("=")
        options: dict[str, Any] = {"tap" if kind == "tap" else "lan": leads}
        for word in words[1:]:
            name, is_pair, value = word.partition("=")
            if word == "host-loopback":
                options["has_host_loopback"] = True
            elif is_pair and name in ("mac", "pcap", "name"):
                options[name] = value
            elif is_pair and name == "rate":
                options["rate"] = parse_rate(value, "bit/s")
            else:
                raise ValueError(f"net {text!r}: expected {FORM}, not {word!r}")
        return cls(kind, **options)

    def _check(self, is_right: bool, expected: str) -> None:
        if not is_right:
            leads = self.lan or self.tap
            shown = f"{self.kind}={leads}" if leads else f"{self.kind}"
            raise ValueError(f"net {shown!r}: expected {expected}")


@dataclass(frozen=True)
class Port:
    """A port of this computer that leads into the guest."""

    host: int
    guest: int
    address: str = LOOPBACK
    """Of this computer, IPv4; 0.0.0.0: all of them."""
    is_udp: bool = False

    def __post_init__(self) -> None:
        for one in (self.host, self.guest):
            if type(one) is not int or not 1 <= one <= 0xFFFF:
                raise ValueError(f"publish {one!r}: expected {PORT_FORM}, ports from 1 to 65535")
        try:
            ipaddress.IPv4Address(self.address)
        except ValueError:
            raise ValueError(
                f"publish {self.address!r}: expected {PORT_FORM}, with an IPv4 address"
            ) from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line's words; ValueError says what was expected."""
        found = _PORT.fullmatch(text)
        if not found:
            raise ValueError(f"publish {text!r}: expected {PORT_FORM}, like 8080:80")
        address, host, guest, protocol = found.groups()
        return cls(int(host), int(guest), address or LOOPBACK, protocol == "udp")

    def __str__(self) -> str:
        return f"{self.address}:{self.host}{'/udp' if self.is_udp else ''}"


def _is_one_cards(address: bytes | None) -> bool:
    return address is not None and not address[0] & 1 and any(address)
