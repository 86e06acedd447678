"""A host and its VMs, from a file: started, run, asked from outside, ended.

    with Fleet(plan, consoles) as fleet:
        fleet.run()

Source: ours; docs/decisions/0061-a-hosts-file-speaks-as-the-command-line.md.
Invariants: what is asked is done on the thread that runs the VMs, between two turns; the end of one
VM is no end of the others, and the end of the last one is that of the fleet.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from understudy.backends.cable import NetworkError
from understudy.backends.folder import ShareError
from understudy.backends.opening import ImageError
from understudy.backends.unix_ports import VsockError
from understudy.bell import Bell
from understudy.fleet.member import CLOSED, Member
from understudy.fleet.plan import HostPlan, PlanError
from understudy.guests.entry import GuestError
from understudy.host import Host
from understudy.linux import VM
from understudy.machine.frames import OutOfFrames
from understudy.verdict import Stop, StopKind

Tell = Callable[[Member], None]
LAST_READ_S = 1.0  # for those who watch a console that has ended
FAULTS = {
    ImageError: "disk", NetworkError: "net", ShareError: "share",
    VsockError: "vsock", OutOfFrames: "memory",
    GuestError: "", MemoryError: "memory", ValueError: "", OSError: "",
}  # fmt: skip
"""What may go wrong when a VM is made, and which key it belongs to."""


class Fleet:
    """One host."""

    def __init__(self, plan: HostPlan, consoles: Path, tell: Tell = lambda member: None) -> None:
        """`tell`: called when a VM has started, when it is told to end, and when it has ended."""
        self.plan, self.tell = plan, tell
        self.host = Host(
            plan.pcpus, plan.ram, policy=plan.policy, pools=plan.pools, engine=plan.engine,
            clock=plan.clock, overcommit=plan.overcommit,
        )  # fmt: skip
        self.members = {one.name: Member(one, self.host, consoles) for one in plan.vms}
        self.host.on_end.append(self._ended)
        self.posts: deque[Callable[[], None]] = deque()
        self.is_closed = self.is_up = False
        self._news = Bell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for member in self.members.values():
            self._over(member, Stop(StopKind.STOPPED, CLOSED), is_bad=False)
        self.is_closed = True
        self._carry_out()
        self.host.close()

    # --- its thread ---

    def start(
        self, progress: Callable[[str, float | None], None] = lambda text, share: None
    ) -> None:
        """Make all VMs.  PlanError if one cannot be, in a line that names it."""
        for member in list(self.members.values()):
            self._carry_out()
            if not member.is_alive:  # it was told to end meanwhile
                continue
            try:
                member.start(progress)
            except tuple(FAULTS) as problem:
                key = next(key for kind, key in FAULTS.items() if isinstance(problem, kind))
                place = f"{member.plan.path}.{key}" if key else member.plan.path
                words = str(problem) or "this computer cannot give so much"
                raise PlanError(f"{self.plan.file}: {place}: {words}") from None
            self.tell(member)
        self.is_up = True

    def run(self) -> bool:
        """Until all VMs have ended; whether all did as they should."""
        members = self.members.values()
        while True:
            self._news.clear()
            self._carry_out()
            self._close_late()
            if not any(member.is_alive for member in members):
                self._drain()
                return not any(member.is_bad for member in members)
            left = self._left_s()
            if any(member.is_active for member in members):
                self.host.run(until=lambda: bool(self.posts), wall_seconds=left)
            else:
                self._news.wait(left)

    def _drain(self) -> None:
        """Let those who watch read the rest, for a moment."""
        ends_at = time.monotonic() + LAST_READ_S
        while time.monotonic() < ends_at:
            self._carry_out()
            if not any(member.line.watchers for member in self.members.values()):
                return
            self._news.wait(0.05)
            self._news.clear()

    def _carry_out(self) -> None:
        while self.posts:
            self.posts.popleft()()

    def _left_s(self) -> float | None:
        """How long none of those that were told to end is late."""
        ends = [one.ends_at for one in self.members.values() if one.is_alive and one.ends_at]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _close_late(self) -> None:
        for member in self.members.values():
            if member.ends_at is not None and member.ends_at <= time.monotonic():
                words = f"it did not power itself off within {self.plan.grace_s:g} s"
                self._over(member, Stop(StopKind.STOPPED, words), is_bad=True)

    def _ended(self, vm: VM, stop: Stop) -> None:
        member = self.members[vm.name]
        self.post(lambda: self._over(member, stop))

    def _over(self, member: Member, stop: Stop, *, is_bad: bool | None = None) -> None:
        if member.is_alive:
            member.end(stop, is_bad=is_bad)
            self.tell(member)

    # --- wishes ---

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: do this on the host's, between two turns."""
        if self.is_closed:
            raise RuntimeError(f"the host {self.plan.name} has ended")
        self.posts.append(action)
        self._news.ring()
        self.host.stop("somebody asks")

    def down(self, names: list[str] | None = None) -> None:
        """Have these power themselves off, or all; a second time: end them.  On its thread."""
        for name in list(self.members) if names is None else names:
            member = self.members[name]
            if member.is_alive:
                member.power_off(self.plan.grace_s)
                self.tell(member)

    def status(self) -> dict[str, Any]:
        """The host and its VMs as plain values.  On its thread."""
        told = self.host.inspect()
        return {
            "host": {
                "name": self.plan.name, "pid": os.getpid(), "file": str(self.plan.file.absolute()),
                "is_up": self.is_up, "clock": self.plan.clock, "engine": self.plan.engine,
                "now": told["now"], "wall": time.monotonic(), "pcpus": told["pcpus"],
                "pools": told["pools"], "ram": told["bytes"], "resident": told["resident_bytes"],
                "memory": self.host.stock.why,
            },
            "vms": [member.row() for member in self.members.values()],
        }  # fmt: skip
