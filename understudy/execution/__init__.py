"""Execution: how a guest's privileged code runs.  One technique a file or package.

A technique is a `Guest`: it is on a processor, brings it into the guest and back, and knows where
the guest's state is kept meanwhile.  It brings its own table of exits, each of which decodes what
the processor says and asks `answers/` what to do.  The vCPU's run loop (`vcpu/loop.py`) drives it.
"""

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.silicon import Processor
from understudy.vcpu.cpu_model import CpuModel


class Execution(Guest):
    """One technique for one vCPU.  Subclass with `class Vmx(Execution, name="vmx")`."""

    ALL: ClassVar[dict[str, type["Execution"]]] = {}
    name: ClassVar[str] = ""
    optional_exits: ClassVar[Mapping[str, str]] = {}
    """What it can have come to the hypervisor though no guest needs that: by name, what for."""
    pagings: ClassVar[tuple[str, ...]] = ()
    """The paging techniques that make sense with it; none: all do."""

    beside: ClassVar[int] = 0
    """Bytes of the host's memory that it may need for each vCPU, for code of its own."""

    hidden_features: ClassVar[tuple[str, ...]] = ()
    """Features that it cannot give a guest, or not well: shown if a user asks for them."""

    cannot_hide: ClassVar[tuple[str, ...]] = ()
    """Features whose instructions a kernel has all the same: refused if a user hides them."""

    needs_own_processor: ClassVar[bool] = False
    """Not on a host whose processors VMs share: its vCPUs cannot be put onto one and taken off."""

    holds_any_guest: ClassVar[bool] = True
    """Not only a guest that was made for it."""

    needs_all_traps: ClassVar[bool] = False
    """A guest runs by it only if its sensitive instructions trap (`Config.virtualizable_isa`)."""

    def __init_subclass__(cls, *, name: str) -> None:
        if name in Execution.ALL:
            raise TypeError(f"two execution techniques are named {name!r}")
        cls.name = name
        Execution.ALL[name] = cls

    @classmethod
    def goes_with(cls) -> tuple[str, ...]:
        """The paging techniques that make sense with it, by name."""
        return cls.pagings or tuple(Paging.ALL)

    @classmethod
    def cr4_available(cls, processor: Processor) -> int:
        """The bits of CR4 that a guest may set when it runs by this technique there."""
        return (1 << 64) - 1

    @abstractmethod
    def __init__(
        self,
        host: Host,
        processor: Processor | None,
        paging: Paging,
        model: CpuModel,
        *,
        keep_timer: bool = True,
        exits: tuple[str, ...] = (),
        before: "Execution | None" = None,
    ) -> None:
        """`keep_timer`: what `arm` was told goes on counting over exits.

        `exits`: those of `optional_exits` that are wanted.

        `processor`: the vCPU's own; None: it is put onto processors and taken off.

        `before`: the technique from which it will `take_over`, on its processor.
        """

    @abstractmethod
    def take_over(self, before: "Execution") -> None:
        """The guest is this one's now, as it is; the other is to be closed."""


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
