"""Debians of one host that are given commands, all at once, while the host runs.

Source: none.  Invariant: what a VM has answered is heard between two of its exits.
"""

from collections.abc import Callable, Mapping
from typing import Final

from understudy.agent.steps import Unattended
from understudy.agent.unattended import whole
from understudy.host import Host
from understudy.linux import VM

SECOND: Final = 1_000_000_000
LONGEST_S: Final = 7200  # of host time


def ask(vm: VM, command: str, ended: Callable[[str, int], None]) -> None:
    """Have a VM carry out a command; `ended` hears the output and the status."""
    heard = bytearray()
    steps = whole(
        command.encode(), heard.extend, lambda status: ended(bytes(heard).decode(), status)
    )
    Unattended(vm.session.channel, steps, vm.fail)


def run_until(host: Host, is_so: Callable[[], bool], seconds: int = LONGEST_S) -> None:
    """Run all until that is so.  AssertionError if so much host time has passed before."""
    host.run(until=is_so, deadline_ns=host.schedule.time.now() + seconds * SECOND)
    assert is_so(), [(vm.name, vm.ended) for vm in host.vms if vm.ended is not None]


def until_booted(host: Host, vms: list[VM], seconds: int = LONGEST_S) -> None:
    """Until each can be asked."""
    run_until(host, lambda: all(vm.session.channel.is_there for vm in vms), seconds)


def ask_all(
    host: Host, commands: Mapping[VM, str], seconds: int = LONGEST_S
) -> dict[VM, str]:  # fmt: skip
    """What each has answered.  AssertionError if a status is not 0."""
    answers: dict[VM, str] = {}

    def begin(vm: VM) -> None:
        def ended(heard: str, status: int) -> None:
            assert not status, (vm.name, status, heard)
            answers[vm] = heard

        ask(vm, commands[vm], ended)

    for vm in commands:
        begin(vm)
    run_until(host, lambda: len(answers) == len(commands), seconds)
    return answers
