"""A switch: who gets which frame, what it remembers, and for how long."""

from understudy.backends.frame import BROADCAST, Frame
from understudy.backends.lan import MOST_ADDRESSES, Lan, LanPort


def _mac(number: int) -> bytes:
    return b"\x02\0\0\0" + number.to_bytes(2, "big")


def _frame(to: bytes, source: bytes) -> Frame:
    return Frame((to + source + b"\x08\0").ljust(60, b"x"))


def _heard(port: LanPort) -> list[Frame]:
    return list(iter(port.take, None))


def _ports(count: int, name: str = "unit") -> list[LanPort]:
    return [LanPort(name) for _ in range(count)]


def _close(ports: list[LanPort]) -> None:
    for port in ports:
        port.close()


def test_unknown_addresses_and_groups_go_to_all_others_and_known_ones_to_one() -> None:
    ports = a, b, _ = _ports(3)
    first, answer = _frame(_mac(2), _mac(1)), _frame(_mac(1), _mac(2))
    a.send(first)
    assert [_heard(port) for port in ports] == [[], [first], [first]]
    b.send(answer)
    assert [_heard(port) for port in ports] == [[answer], [], []]
    a.send(first)
    assert [_heard(port) for port in ports] == [[], [first], []]
    a.send(called := _frame(BROADCAST, _mac(1)))
    assert [_heard(port) for port in ports] == [[], [called], [called]]
    a.send(_frame(_mac(1), _mac(3)))
    assert [_heard(port) for port in ports] == [[], [], []], "who has it is on the same port"
    assert (a.lan.forwarded, a.lan.flooded) == (3, 2)
    _close(list(ports))


def test_a_port_that_floods_forgets_its_own_addresses_alone() -> None:
    ports = a, b, c = _ports(3)
    b.send(_frame(BROADCAST, _mac(1)))
    for number in range(1000, 1000 + MOST_ADDRESSES + 5):
        a.send(_frame(BROADCAST, _mac(number)))
    assert len(a.addresses) == MOST_ADDRESSES and len(a.lan.place) == MOST_ADDRESSES + 1
    for port in ports:
        _heard(port)
    c.send(_frame(_mac(1), _mac(2)))
    assert (len(_heard(a)), len(_heard(b))) == (0, 1)
    c.send(_frame(_mac(1000), _mac(2)))
    assert (len(_heard(a)), len(_heard(b))) == (1, 1), "one that was forgotten goes to all"
    _close(list(ports))


def test_an_address_moves_with_its_card_and_goes_with_its_port() -> None:
    ports = a, b, c = _ports(3)
    a.send(_frame(BROADCAST, _mac(1)))
    b.send(_frame(BROADCAST, _mac(1)))
    assert (list(a.addresses), list(b.addresses)) == ([], [_mac(1)])
    b.close()
    _heard(a)
    c.send(_frame(_mac(1), _mac(3)))
    assert len(_heard(a)) == 1
    b.send(_frame(BROADCAST, _mac(1)))
    assert _heard(a) == [], "its cable is pulled"
    _close([a, c])
    _close(list(ports))


def test_networks_are_apart_by_their_names_and_end_with_their_last_port() -> None:
    a, b = LanPort("one"), LanPort("two")
    a.send(_frame(BROADCAST, _mac(1)))
    assert _heard(b) == []
    a.close()
    assert "one" not in Lan.ALL and "two" in Lan.ALL
    b.close()
    assert "two" not in Lan.ALL
