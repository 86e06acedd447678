"""What is done with an agent before the first command, and with the guest after the last.

Source: ours; Linux's sched_setscheduler(2), sigprocmask(2), kill(2), reboot(2).
"""

import struct
from typing import Final

from understudy.agent.calls import O_CLOEXEC, O_RDONLY, Call, Request
from understudy.agent.command import SIG_SETMASK, SIGKILL
from understudy.agent.steps import Steps
from understudy.guests.agent_program import SCRATCH_GVA

ENVIRONMENT_BYTES: Final = 1 << 17
SCHED_FIFO, RESET_ON_FORK = 1, 0x4000_0000
SIGPIPE, SIGTERM, SIGCONT = 13, 15, 18
ALL: Final = -1  # processes, but for the first and the one that asks
LEAVE_MS: Final = 1000  # that programs have at least to end by themselves
LOOK_MS: Final = 100  # between looking for commands that still run
WNOHANG: Final = 1
REBOOT_MAGIC: Final = 0xFEE1_DEAD, 0x2812_1969
POWER_OFF: Final = 0x4321_FEDC  # LINUX_REBOOT_CMD_POWER_OFF


def settle() -> Steps[list[bytes]]:
    """Prepare the agent for commands; the environment that they are to have.

    It runs before all others as soon as it has something to do, and a pipe whose reader is gone
    does not end it.
    """
    request = Request()
    request.call(Call.SCHED_SETSCHEDULER, 0, SCHED_FIFO | RESET_ON_FORK, request.words(1))
    blocked = request.data(struct.pack("<Q", 1 << SIGPIPE - 1))
    request.call(Call.RT_SIGPROCMASK, SIG_SETMASK, blocked, 0, 8)
    file = request.call(Call.OPEN, request.text("/proc/self/environ"), O_RDONLY | O_CLOEXEC)
    read = request.call(Call.READ, file, SCRATCH_GVA, ENVIRONMENT_BYTES)
    request.call(Call.CLOSE, file)
    request.answer(read, ENVIRONMENT_BYTES)
    (variables,) = (yield request).spans
    return [one for one in variables.split(b"\0") if one]


def shut_down(patience_ms: int) -> Steps[None]:
    """As an init does: have all programs end, end those that do not, and switch the guest off.

    patience_ms: of the guest's time, in which a command that runs may end by itself.
    """
    request = Request()
    for number in (SIGTERM, SIGCONT):
        request.call(Call.KILL, ALL, number)
    yield request
    waited_ms = 0
    while ((yield from _has_commands()) and waited_ms < patience_ms) or waited_ms < LEAVE_MS:
        request = Request()
        request.call(Call.POLL, 0, 0, LOOK_MS)
        yield request
        waited_ms += LOOK_MS
    request = Request()
    request.call(Call.KILL, ALL, SIGKILL)
    yield request
    yield from power_off()


def _has_commands() -> Steps[bool]:
    """Whether a command that the agent started has not ended."""
    while True:
        request = Request()
        ended = request.call(Call.WAIT4, ALL, 0, WNOHANG, 0)
        pid = (yield request)[ended]
        if pid <= 0:
            return pid == 0


def power_off() -> Steps[None]:
    """Write out what is to be kept, and switch the guest off."""
    request = Request()
    request.call(Call.SYNC)
    request.call(Call.REBOOT, *REBOOT_MAGIC, POWER_OFF, 0)
    yield request
