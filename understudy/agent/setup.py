"""What is done with an agent before the first command, and with the guest after the last.

Source: ours; Linux's sched_setscheduler(2), sigprocmask(2), reboot(2).
"""

import struct
from typing import Final

from understudy.agent.calls import O_CLOEXEC, O_RDONLY, Call, Request
from understudy.agent.command import SIG_SETMASK, Ask
from understudy.guests.agent_program import SCRATCH_GVA

ENVIRONMENT_BYTES: Final = 1 << 17
SCHED_FIFO, RESET_ON_FORK = 1, 0x4000_0000
SIGPIPE: Final = 13
REBOOT_MAGIC: Final = 0xFEE1_DEAD, 0x2812_1969
POWER_OFF: Final = 0x4321_FEDC  # LINUX_REBOOT_CMD_POWER_OFF


def settle(ask: Ask) -> list[bytes]:
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
    (variables,) = ask(request).spans
    return [one for one in variables.split(b"\0") if one]


def power_off(ask: Ask) -> None:
    """Write out what is to be kept, and switch the guest off."""
    request = Request()
    request.call(Call.SYNC)
    request.call(Call.REBOOT, *REBOOT_MAGIC, POWER_OFF, 0)
    ask(request)
