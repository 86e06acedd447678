"""Execution: how a guest's privileged code runs.  One technique a file.

A technique owns a processor, brings it into the guest and back, and knows where the guest's
state is kept meanwhile.  What an exit *means* is decided in `exits.py`; the vCPU's run loop
(`vcpu.py`) drives both.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from understudy.machine.host import Host

if TYPE_CHECKING:
    from understudy.paging import Paging
    from understudy.silicon import Exit, Processor
    from understudy.vcpu.cpu_model import CpuModel


class Execution(ABC):
    """One technique for one vCPU.  Subclass with `class Vmx(Execution, name="vmx")`."""

    ALL: ClassVar[dict[str, type["Execution"]]] = {}
    name: ClassVar[str] = ""

    processor: "Processor"
    resume: "Callable[[int], Exit]"
    """Enter the guest with an instruction budget (0: none); returns at the next exit."""
    timer_shift: int
    """`arm` counts in units of 2**timer_shift TSC ticks."""

    def __init_subclass__(cls, *, name: str) -> None:
        if name in Execution.ALL:
            raise TypeError(f"two execution techniques are named {name!r}")
        cls.name = name
        Execution.ALL[name] = cls

    def __init__(
        self, host: Host, processor: "Processor", paging: "Paging", model: "CpuModel"
    ) -> None:
        self.host, self.processor, self.paging, self.model = host, processor, paging, model

    @abstractmethod
    def set_registers(self, values: dict[str, int]) -> None:
        """Set the guest's registers, by the names of `Processor.registers`."""

    @abstractmethod
    def registers(self) -> dict[str, int]:
        """All of the guest's registers."""

    @abstractmethod
    def skip(self, length: int) -> None:
        """The instruction that exited is done: go past it."""

    @abstractmethod
    def inject(self, info: int, error: int, length: int) -> None:
        """Deliver this event (in the format of the interruption information) on the next entry."""

    @abstractmethod
    def window(self, interrupts: bool, nmis: bool) -> None:
        """Whether to exit as soon as the guest can take an interrupt, or an NMI."""

    @abstractmethod
    def takes_interrupts(self) -> bool:
        """RFLAGS.IF is set and nothing blocks interrupts."""

    @abstractmethod
    def takes_nmis(self) -> bool: ...

    @abstractmethod
    def unblock_nmis(self) -> None:
        """The NMI in delivery will be delivered again."""

    @abstractmethod
    def interrupt_flag(self) -> bool:
        """RFLAGS.IF."""

    @abstractmethod
    def arm(self, ticks: int) -> None:
        """Exit after this many units of guest time."""

    @abstractmethod
    def frames(self) -> list[int]:
        """The host frames (pfn) of the technique's own structures."""


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
