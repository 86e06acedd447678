"""Techniques that change while a VM runs: of memory, and of execution.

    vm.paging = "lazy"
    vm.execution = "bt"          # with the next exit; the guest notices nothing

Another technique of execution takes over the guest where VMX keeps it (decision 0090).

Source: ours.  Invariants: what the guest sees of its processor stays the same, what is counted goes
on; a change that cannot be is a ValueError that says why, and nothing has changed then.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from understudy import assembly
from understudy.closed import says_closed
from understudy.config import Config, check_choice
from understudy.execution import Execution
from understudy.machine.frames import OutOfFrames
from understudy.machine.memory import GuestMemory
from understudy.overcommit.plan import PlanError
from understudy.paging import Paging
from understudy.plugging import Pluggable
from understudy.silicon import Processor
from understudy.tenant import check, promise, still
from understudy.vcpu.loop import Vcpu


@says_closed()
class Changing(Pluggable):
    """What a VM says and does of its techniques."""

    memory: GuestMemory
    processors: list[Processor]
    pages: Paging

    @property
    def paging(self) -> str:
        """The technique by which the guest's memory is virtualised now."""
        return self.pages.name

    @paging.setter
    def paging(self, name: str) -> None:
        """Change it at the next exit; the guest notices nothing.  From any thread.

        PlanError if the host has no room for the tables.
        """
        check(f"paging {name!r}", self.host, self.memory, assembly.with_paging(self.config, name))
        self.post(lambda: grant(self.change_paging, name))

    @still
    def change_paging(self, name: str) -> None:
        """Change it now: on the VM's thread, between two exits.

        OutOfFrames or PlanError if the host has no room for the tables; nothing has changed then.
        """
        config = assembly.with_paging(self.config, name)
        if name != self.pages.name:
            self._change(config)

    @property
    def execution(self) -> str:
        """The technique by which the guest's code is executed now."""
        return self.config.execution

    @execution.setter
    def execution(self, name: str) -> None:
        """Change it at the next exit; the guest notices nothing.  From any thread."""
        self._with_execution(name)
        self.post(lambda: self.change_execution(name))

    @still
    def change_execution(self, name: str) -> None:
        """Change it now: on the VM's thread, between two exits.

        The paging technique stays if it goes with the new one; else the first that does comes with
        it.  OutOfFrames if the host has no room; nothing has changed then.
        """
        config = self._with_execution(name)
        if name == self.config.execution:
            return
        self._change(config)

    def _with_execution(self, name: str) -> Config:
        if not self.processors:
            raise ValueError(
                f"execution {name!r}: expected a host whose processors VMs do not share"
            )
        if any(vcpu.entry is not vcpu.guest for vcpu in self.vcpus):
            raise ValueError(f"execution {name!r}: expected processors that do not run in threads")
        return with_execution(self.config, name, self.vcpus[0].model.shown)

    def _change(self, config: Config) -> None:
        old, successors = self.pages, list[Execution]()
        for vcpu in self.vcpus:
            vcpu.leave_guest()
        old.finish_steps()
        with ExitStack() as given:  # back, if there is no room
            promise(self.host, self.memory, config)
            given.callback(promise, self.host, self.memory, self.config)
            pages = assembly.paging_of(config, self.host, self.memory)
            given.callback(pages.close)
            for vcpu in self.vcpus:
                pages.prepare(vcpu.guest.control().cr0)
            if config.execution != self.config.execution:
                for vcpu in self.vcpus:
                    successors.append(self._successor(config, vcpu, pages))
                    given.callback(successors[-1].close)
            given.pop_all()
        self.pages, self.config = pages, config
        pages.continue_counts(old)
        for number, vcpu in enumerate(self.vcpus):
            if successors:
                hand_on(vcpu, successors[number])
            else:
                vcpu.use(pages)
        old.close()

    def _successor(self, config: Config, vcpu: Vcpu, pages: Paging) -> Execution:
        before = vcpu.guest
        assert isinstance(before, Execution)
        return assembly.guest_of(
            config, self.host, before.place_now, pages, vcpu.model, before
        )  # fmt: skip


def grant(change: Callable[[str], None], name: str) -> None:
    """Do what was wished for.  OutOfFrames if somebody else has come to need the room for it."""
    try:
        change(name)
    except PlanError as problem:
        raise OutOfFrames(str(problem)) from None


def hand_on(vcpu: Vcpu, guest: Execution) -> None:
    """Have another technique execute this vCPU's guest from now on; what is counted goes on."""
    old = vcpu.guest
    assert isinstance(old, Execution)
    retired = old.retired
    guest.take_over(old)
    vcpu.state.carried_out += retired - guest.retired
    vcpu.guest = vcpu.entry = guest
    vcpu.view, vcpu.table = guest.view, guest.table
    vcpu.gpr, vcpu.set_gpr, vcpu.skip = guest.gpr, guest.set_gpr, guest.skip
    for part in (vcpu.events, vcpu.msrs, vcpu.pmu, vcpu.time):
        part.guest = guest
    for reason in guest.table:
        vcpu.exits.setdefault(reason, 0)
    guest.notify, guest.moved, guest.overflowed = old.notify, old.moved, old.overflowed
    guest.moved()
    old.close()


def with_execution(config: Config, name: str, shown: frozenset[str]) -> Config:
    """The same VM by another technique of execution.  ValueError if that cannot be.

    shown: the features that the guest has been shown, and must keep.
    """
    check_choice("execution", name, Execution.ALL)
    before, technique = Execution.ALL[config.execution], Execution.ALL[name]
    if name == config.execution:
        return config
    if not before.holds_any_guest or not technique.holds_any_guest:
        raise ValueError(f"execution {name!r}: a paravirtual kernel is made for its own")
    if missing := sorted(shown.intersection(technique.hidden_features)):
        raise ValueError(
            f"execution {name!r}: the guest has been shown {', '.join(missing)}; expected them to "
            f"be hidden from the start: --cpu understudy,-{',-'.join(technique.hidden_features)}"
        )
    if technique.needs_all_traps and not config.virtualizable_isa:
        raise ValueError(
            f"execution {name!r}: sensitive instructions would fail; expected --virtualizable-isa"
        )
    goes_with = technique.goes_with()
    config = replace(
        config, execution=name, cpu=assembly.shown_by(config.cpu, before.hidden_features),
        paging=config.paging if config.paging in goes_with else goes_with[0],
    )  # fmt: skip
    assembly.check_names(config)
    return config
