"""Memory virtualisation: how a guest's page tables become something the processor may use.

One technique a file.  The interface is the events that a guest causes; a technique answers those
it cares about.  Two more modules here are not techniques: `guest_walk` reads a guest's own
tables.

Invariants of every technique, for every gva and at every guest instruction:
  * never stale: what the processor may do, the guest's tables allow, or allowed when it last
    had to flush;
  * eventually complete: an access that they allow succeeds, after finitely many exits.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from understudy.host import Host
from understudy.memory import P2m

if TYPE_CHECKING:
    from understudy.silicon import Exit, Processor


class PagingError(Exception):
    """The tables and the processor disagree: a defect of ours, or of the silicon."""


class Paging(ABC):
    """One technique for one VM.  Subclass with `class Ept(Paging, name="ept")`."""

    ALL: ClassVar[dict[str, type["Paging"]]] = {}
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str) -> None:
        if name in Paging.ALL:
            raise TypeError(f"two paging techniques are named {name!r}")
        cls.name = name
        Paging.ALL[name] = cls

    def __init__(self, host: Host, p2m: P2m, *, largest: int | str = "1G") -> None:
        """`largest` is the largest page that the technique's own tables may use."""
        self.host, self.p2m = host, p2m
        self.processors: list[Processor] = []
        self.fills = 0  # exits after which the access could go on because an entry was added
        p2m.watchers.append(self.p2m_change)

    def attach(self, processor: "Processor") -> None:
        """A processor is going to use this technique's tables."""
        self.processors.append(processor)

    @property
    def eptp(self) -> int:
        """The EPT pointer for the VMCS; 0 for techniques without EPT."""
        return 0

    @abstractmethod
    def p2m_change(self, gfn: int, count: int) -> None:
        """These guest frames have moved, come or gone."""

    @abstractmethod
    def violation(self, exit: "Exit") -> bool:
        """An access that the tables refused.  True: they now allow it, resume the guest.

        False: there is no RAM, the access is for a device.
        """

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """What a snapshot must keep beside the frames, as plain values."""

    @abstractmethod
    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved; the frames are restored by others."""

    @abstractmethod
    def frames(self) -> list[int]:
        """The host frames (pfn) that the tables occupy."""


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
