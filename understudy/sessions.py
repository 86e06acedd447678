"""What talks with a VM's guest and must go on where it was after a snapshot: kept by name.

Source: ours.  Invariant: the state of a session that nobody has attached yet is not lost: it is
given to whoever attaches under that name, and is in the next snapshot as it was.
"""

from typing import Any, Protocol


class Session(Protocol):
    """What can be kept."""

    def save(self) -> dict[str, Any]:
        """All that a snapshot must keep, as plain values."""

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved.  ValueError if it does not fit."""


class Sessions:
    """The sessions of one VM."""

    def __init__(self) -> None:
        self._attached: dict[str, Session] = {}
        self._waiting: dict[str, dict[str, Any]] = {}

    def attach(self, name: str, session: Session) -> None:
        """Keep it from now on; it becomes what a snapshot said of that name, if the VM has one."""
        self._attached[name] = session
        if (saved := self._waiting.pop(name, None)) is not None:
            session.load(saved)

    def save(self) -> dict[str, Any]:
        """All of them, by name."""
        return self._waiting | {name: one.save() for name, one in self._attached.items()}

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved.  ValueError if it does not fit."""
        for name, state in saved.items():
            if not isinstance(state, dict):
                raise ValueError(f"snapshot: the session {name} is {state!r:.40}, expected a dict")
            if name in self._attached:
                self._attached[name].load(state)
            else:
                self._waiting[name] = state
