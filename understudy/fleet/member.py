"""One VM of a host that was started from a file: its life, from its plan to how it ended.

Source: ours.  Invariants: a VM that has ended holds nothing of the host any more, and what was
counted of it last can still be asked; all is called on the host's thread.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from understudy.agent.mounting import mounted
from understudy.agent.setup import shut_down
from understudy.agent.steps import Steps, Unattended
from understudy.agent.unattended import whole
from understudy.control.line import Line
from understudy.devices.acpi import PWRBTN
from understudy.fleet.console_file import ConsoleFile
from understudy.fleet.plan import VmPlan
from understudy.host import Host
from understudy.last_words import ending, stop_in_words
from understudy.linux import VM
from understudy.quantities import bytes_of
from understudy.sched.seat import State
from understudy.verdict import Stop, StopKind

SHOWN_FIRST: Final = 4096  # bytes of the console for who comes later
PAUSED: Final = Stop(StopKind.UNTIL, "paused")
"""No limit of a run: the host lets the VM be until it is resumed."""
CLOSED: Final = "it was told to end"
WELL: Final = frozenset({StopKind.POWEROFF, StopKind.STOPPED})


class Member:
    """A VM and its plan."""

    def __init__(self, plan: VmPlan, host: Host, consoles: Path) -> None:
        self.plan, self.name, self.host = plan, plan.name, host
        self.file = ConsoleFile(consoles / f"{plan.name}.txt")
        self.line = Line(self._type, self._unread)
        self.vm: VM | None = None
        self.stop: Stop | None = None  # how it has ended
        self.is_bad = False  # and not as it should
        self.ends_at: float | None = None  # real time, since it was told to end
        self.last: dict[str, Any] = {"state": "starting"}
        self.how = ""

    # --- its life ---

    def start(self, progress: Callable[[str, float | None], None]) -> None:
        """Make the VM, ready to run."""
        plan = self.plan
        self.vm = vm = self.host.linux(
            plan.guest, initrd=plan.initrd, append=plan.append, packages=plan.packages,
            config=plan.config, progress=progress, weight=plan.weight, cap=plan.cap,
            pool=plan.pool,
        )  # fmt: skip
        vm.console.on_output += [self.file.heard, self.line.heard]
        if plan.command is not None or plan.config.folders:
            self._do(self._first())

    def _first(self) -> Steps[None]:
        """What the guest is asked to do by itself."""
        yield from mounted(self.plan.config)
        if self.plan.command is not None:
            raw = self.plan.command.encode("utf-8", "surrogateescape")
            yield from whole(raw, self._heard_command, self._command_ended)

    def _do(self, steps: Steps[None]) -> None:
        """Have the guest's agent do this, instead of what it does, when it is there."""
        assert self.vm is not None
        Unattended(self.vm.session.channel, steps, self.vm.fail)

    def _heard_command(self, data: bytes) -> None:
        self.file.heard(data)
        self.line.heard(data.replace(b"\n", b"\r\n"))

    def _command_ended(self, status: int) -> None:
        assert self.vm is not None
        self.vm.endings.request(Stop(StopKind.DEBUG_EXIT, f"exec ended with {status}", status))

    @property
    def is_alive(self) -> bool:
        """It has not ended."""
        return self.stop is None

    @property
    def is_active(self) -> bool:
        """It takes part in runs of the host."""
        return self.vm is not None and self.vm.ended is None

    def end(self, stop: Stop, *, is_bad: bool | None = None) -> None:
        """It has ended so; everything is given back to the host."""
        if not self.is_alive:
            return
        self.stop = stop
        is_well = stop.kind in WELL or (stop.kind is StopKind.DEBUG_EXIT and not stop.status)
        self.is_bad = not is_well if is_bad is None else is_bad
        if self.vm is not None:
            self.last = self.counted(self.vm)
            self.how = _how(stop, self.vm.console_text)
            self.vm.close()
            self.vm = None
        self.last |= {"state": "ended", "resident": 0}
        self.line.close()
        self.file.close()

    def power_off(self, grace_s: float) -> None:
        """Have the guest end in an orderly way; at once if there is nobody to be told.

        A second time: at once.
        """
        vm = self.vm
        if not self.is_alive:
            return
        if vm is None or self.ends_at is not None:
            self.end(Stop(StopKind.STOPPED, CLOSED), is_bad=self.is_bad)
            return
        button = bool(vm.pc.acpi.state.enable & PWRBTN)
        if not (button or vm.session.channel.is_there or self.plan.has_agent):
            self.end(Stop(StopKind.STOPPED, CLOSED), is_bad=False)
            return
        self.resume()
        self.ends_at = time.monotonic() + grace_s
        if vm.session.channel.is_there or self.plan.has_agent:
            self._do(shut_down(int(1000 * grace_s / 2)))
        if button:
            vm.pc.acpi.press_power_button()

    @property
    def ends_in_s(self) -> float | None:
        """Real time until it is ended, if it was told to end and has not yet."""
        if self.ends_at is None or not self.is_alive:
            return None
        return max(0.0, self.ends_at - time.monotonic())

    def pause(self) -> None:
        """Let it stand still."""
        if self.is_active and self.vm is not None:
            self.host.schedule.end(self.vm.claim, PAUSED)

    def resume(self) -> None:
        """Let it go on."""
        if self.vm is not None and self.vm.ended is PAUSED:
            self.host.schedule.resume(self.vm.claim)

    # --- its console ---

    def _type(self, typed: bytes) -> None:
        if self.vm is not None:
            self.vm.console.receive(typed)

    def _unread(self) -> int:
        vm = self.vm
        try:
            return 0 if vm is None else vm.pc.com1.unread
        except (AttributeError, RuntimeError):  # it ends in this moment
            return 0

    @property
    def shown(self) -> bytes:
        """The end of what it printed, from the beginning of a line on."""
        if self.vm is None:
            return b""
        heard = bytes(self.vm.session.state.heard[-SHOWN_FIRST:])
        return re.sub(rb"\A[^\n]*\n", b"", heard) if len(heard) == SHOWN_FIRST else heard

    # --- what there is to say ---

    def row(self) -> dict[str, Any]:
        """How it is, as plain values."""
        plan, vm = self.plan, self.vm
        if vm is not None:
            self.last = self.counted(vm)
        return {
            "name": self.name, "guest": str(plan.guest), "cpus": plan.config.topology.count,
            "memory": bytes_of(plan.config.memory), "weight": plan.weight, "cap": plan.cap,
            "pool": plan.pool, "paging": plan.config.paging, "ended": self.how,
            "is_bad": self.is_bad, "console": str(self.file.path), "ends_in_s": self.ends_in_s,
        } | self.last  # fmt: skip

    def counted(self, vm: VM) -> dict[str, Any]:
        """What changes."""
        counts = vm.counts()
        seats = counts["scheduling"]
        ns = {str(state): sum(seat["ns"].get(state, 0) for seat in seats) for state in State}
        return {
            "state": self._state(vm), "weight": vm.weight, "cap": vm.cap, "pool": vm.pool,
            "paging": vm.paging, "guest_ns": vm.clock.now(),
            "instructions": counts["instructions"], "exits": sum(counts["exits"].values()),
            "resident": self._resident(vm), "ns": ns,
            "pages": self.host.stock.holdings[vm.memory.p2m].told(),
            "switches": sum(sum(seat["switches"].values()) for seat in seats),
            "longest_wait_ns": max(seat["longest_wait_ns"] for seat in seats),
        }  # fmt: skip

    def _state(self, vm: VM) -> str:
        if vm.ended is PAUSED:
            return "paused"
        states = {seat.state for seat in vm.claim.seats}
        order = (State.RUNNING, State.RUNNABLE, State.BLOCKED)
        return str(next((one for one in order if one in states), State.AWAY))

    def _resident(self, vm: VM) -> int:
        """Bytes of the computer's memory behind its RAM."""
        fd = self.host.memory.fd
        return sum(_data(fd, pfn << 12, pfn + count << 12) for _, pfn, count in vm.memory.p2m)


def _how(stop: Stop, console: str) -> str:
    """How it ended, in a line."""
    if stop.kind is StopKind.DEBUG_EXIT and stop.detail:
        return stop.detail
    return ending(stop, console) if stop.detail != CLOSED else stop_in_words(stop)


def _data(fd: int, at: int, end: int) -> int:
    """Bytes in this part of a sparse file that are no hole.  lseek(2)."""
    found = 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # none is left
            return found
        at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        found += max(0, at - start)
    return found
