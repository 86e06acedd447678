"""Real-address mode without the guest's EPT: an EPT just for that.

VMX runs a guest with CR0.PE=0 only as an "unrestricted guest", which needs EPT (SDM 3C,
"Unrestricted Guests").  Start-up code of a processor, a firmware image and a BIOS run so.  Each
processor is translated by these tables from where it leaves protected mode to where it pages: what
a start-up does without paging is short, and all registers change hands only once.

Source: what KVM does on processors without unrestricted guest is to emulate such code; ours.
Invariant: the tables exist while any processor of the VM uses them.
"""

from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging import View
from understudy.paging.ept import Ept


class RealMode:
    """The EPT that the processors of one VM share while they do not page."""

    def __init__(self, host: Host, p2m: P2m) -> None:
        self._host, self._p2m = host, p2m
        self._ept: Ept | None = None
        self.spells = 0  # times that a processor came to need it

    def enter(self, guest: Guest) -> View:
        """A processor is going to use these tables.  OutOfFrames if the host has no room."""
        ept = self.prepare()
        self.spells += 1
        return ept.attach(guest)

    def prepare(self) -> Ept:
        """The tables, made now if they are not there."""
        if self._ept is None:
            self._ept = Ept(self._host, self._p2m)
        return self._ept

    def leave(self, guest: Guest) -> None:
        """It does not use them any more."""
        assert self._ept is not None
        self._ept.guests.remove(guest)
        if not self._ept.guests:
            self.close()

    def close(self) -> None:
        """Give their frames back."""
        if self._ept is not None:
            self._ept.close()
            self._ept = None

    def frames(self) -> list[int]:
        """The host frames (pfn) that the tables occupy."""
        return [] if self._ept is None else self._ept.frames()
