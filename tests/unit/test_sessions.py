"""What is kept by name, attached before or after a snapshot is read."""

from typing import Any

import pytest

from understudy.sessions import Sessions


class Counted:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"n": 1}

    def save(self) -> dict[str, Any]:
        return dict(self.state)

    def load(self, saved: dict[str, Any]) -> None:
        self.state = saved


def test_attached_before_or_after() -> None:
    for attach_first in (True, False):
        sessions, one = Sessions(), Counted()
        if attach_first:
            sessions.attach("one", one)
        sessions.load({"one": {"n": 5}, "other": {"n": 7}})
        assert sessions.save() == {"one": {"n": 5}, "other": {"n": 7}}
        if not attach_first:
            sessions.attach("one", one)
        assert one.state == {"n": 5}
        one.state = {"n": 6}
        assert sessions.save() == {"one": {"n": 6}, "other": {"n": 7}}


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="session one is 7, expected a dict"):
        Sessions().load({"one": 7})
