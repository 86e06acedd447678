"""A physical machine whose processors virtual machines share.

    with Host(pcpus=2, ram="8G") as host:
        a = host.linux("cloud-amd64", memory="256M", name="a", weight=2)
        b = host.vm("64M", name="b", cap=0.5)
        host.run(until=lambda: b.ended is not None)

Invariants: a VM that ends (switched off, crashed, stuck, closed) disturbs no other; what `VM.go` or
a command of one VM waits for, the others go on meanwhile.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

from understudy.config import Config
from understudy.interruption import interruptible
from understudy.linux import VM
from understudy.sched.host import SharedHost
from understudy.sched.house import DEFAULT
from understudy.sched.schedule import LIMITS, Aim
from understudy.sched.seat import Claim
from understudy.verdict import Stop, StopKind


class Host(SharedHost):
    """A physical machine: `Host(pcpus=2, ram="8G", policy="share", pools=…)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_end: list[Callable[[VM, Stop], None]] = []
        self.schedule.ended = self._ended

    def close(self) -> None:
        """Close all VMs on it, and give everything back to the computer.

        RuntimeError while one of them runs.
        """
        if not self.is_closed:
            for vm in self.vms:
                vm.close()
            super().close()

    # --- who lives here ---

    @property
    def vms(self) -> list[VM]:
        """Those that are not closed."""
        return [claim.owner for claim in self.schedule.claims]

    def vm(
        self, config: Config | int | str | None = None, *, weight: float = 1,
        cap: float | None = None, pool: str = DEFAULT, **options: Any,
    ) -> VM:  # fmt: skip
        """A VM on this host.  The options are those of `VM`."""
        return self._admitted(VM(config, host=self, **self._own(options)), weight, cap, pool)

    def linux(
        self, guest: str | Path = "cloud-amd64", *, weight: float = 1, cap: float | None = None,
        pool: str = DEFAULT, **options: Any,
    ) -> VM:  # fmt: skip
        """A VM on this host with a guest loaded.  The options are those of `VM.linux`."""
        made = VM.linux(guest, host=self, **self._own(options))
        return self._admitted(made, weight, cap, pool)

    def _own(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"engine": self.engine, "clock": self.clock} | options

    def _admitted(self, vm: VM, weight: float, cap: float | None, pool: str) -> VM:
        try:
            vm.weight, vm.cap = weight, cap
            vm.pool = pool
        except BaseException:
            vm.close()
            raise
        return vm

    def move(self, what: VM | int, pool: str) -> None:
        """A VM, or the pCPU of that number, to another pool, while VMs run.

        PolicyError if it cannot go: nothing has changed then.
        """
        if isinstance(what, int):
            self.schedule.move_pcpu(what, pool)
        else:
            self.schedule.move_claim(what.claim, pool)

    # --- running ---

    def run(
        self,
        *,
        until: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
        wall_seconds: float | None = None,
        budget: int | None = None,
    ) -> Stop:
        """Run all VMs until one of these, or until all have ended: then how the last one did.

        until: asked after each exit of any of them.  deadline_ns: host time.  wall_seconds: real
        time.  budget: instructions of all VMs.
        """
        schedule = self.schedule
        schedule.asked = None  # before `until` is: what is asked for from now on counts
        if until is not None and until():
            return Stop(StopKind.UNTIL)
        for claim in schedule.claims:
            if claim.ended is not None and claim.ended.kind in LIMITS:
                schedule.resume(claim)
        end = None
        if budget is not None:
            end = budget + sum(claim.retired for claim in schedule.claims)
        aim = Aim(None, end, until)
        if deadline_ns is not None:
            aim.deadline = deadline_ns
        with ExitStack() as given:
            given.enter_context(interruptible(lambda: self.stop("interrupted")))
            if wall_seconds is not None:
                over = Stop(StopKind.WALL, f"{wall_seconds} s")
                timer = Timer(max(wall_seconds, 0), schedule.ask, (over,))
                timer.daemon = True
                timer.start()
                given.callback(timer.join)
                given.callback(timer.cancel)
            stop = schedule.run(aim)
        for vm in self.vms:
            vm.endings.raise_problem()
        return stop

    def _ended(self, claim: Claim) -> None:
        if claim.ended is not None:
            for listener in self.on_end:
                listener(claim.owner, claim.ended)
