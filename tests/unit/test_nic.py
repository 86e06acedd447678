"""Network cards and ports as one says them, and what is refused."""

from typing import Any

import pytest

from understudy.config import Config
from understudy.nic import Nic, Port
from understudy.state import plain, restore


def test_what_the_command_line_says() -> None:
    assert Nic.parse("user") == Nic("user")
    assert Nic.parse("lan=a-b.1,mac=52:54:00:AB:00:01,rate=10M") == Nic(
        "lan", "a-b.1", "52:54:00:ab:00:01", 10_000_000
    )
    asked = Nic.parse("user,host-loopback,pcap=/tmp/a,,b.pcap")
    assert asked.has_host_loopback and asked.pcap == "/tmp/a,b.pcap"
    assert Nic.parse("lan=a,mac=52:54:00:ab:00:01").address == b"\x52\x54\0\xab\0\1"
    assert Nic.parse("tap=tap0.1,name=a") == Nic("tap", tap="tap0.1", name="a")
    assert Port.parse("8080:80") == Port(8080, 80, "127.0.0.1")
    assert Port.parse("0.0.0.0:53:5353/udp") == Port(53, 5353, "0.0.0.0", is_udp=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("usr", "one of user, lan, tap, none"),
        ("", "one of user"),
        ("lan", "lan=NAME"),
        ("lan=a b", "lan=NAME"),
        ("user=a", "lan=NAME"),
        ("tap", "tap=NAME"),
        ("tap=a/b", "tap=NAME"),
        ("tap=..", "tap=NAME"),
        ("tap=sixteen-letters-", "at most 15 characters"),
        ("lan=a,host-loopback", "host-loopback with user"),
        ("user,mac=52:54:00:12:34", "mac= like"),
        ("user,mac=53:54:00:12:34:56", "mac= like"),
        ("user,mac=00:00:00:00:00:00", "mac= like"),
        ("user,rate=fast", "bit/s"),
        ("user,rate=1K", "8K to 1000G"),
        ("user,what", "not 'what'"),
    ],
)
def test_a_card_that_cannot_be(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        Nic.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["80", "0:80", "80:70000", "a:80:80", "1.2.3:80:80", "80:80/sctp"])
def test_a_port_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="publish"):
        Port.parse(text)


def test_a_config_has_them_and_its_snapshot_too() -> None:
    config = Config(net="user", publish=["8080:80"])
    assert config.net == (Nic("user"),) and config.has_virtio and config.has_outside
    assert restore(Config, plain(config), "config") == config
    tap = Config(net="tap=t0")
    assert tap.is_linked and tap.has_outside and restore(Config, plain(tap), "config") == tap
    lan = Config(net=["lan=a", Nic("none")])
    assert lan.is_linked and not lan.has_outside and not Config(net="none").is_linked


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"publish": "8080:80"}, "publish: expected a card with net user"),
        ({"net": "lan=a", "publish": "8080:80"}, "publish: expected a card with net user"),
        ({"net": ["user", "user"]}, "2 cards of kind user"),
        ({"net": ["lan=a"] * 5}, "4 at most"),
        ({"net": 5}, "expected network cards"),
        ({"net": [5]}, "expected network cards"),
    ],
)
def test_cards_that_cannot_be_together(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Config(**options)
