"""Disks, network cards and shared folders that come and go while a VM runs.

    vm.plug(Disk("data.img", name="data"))
    vm.unplug("data")                               # the guest is asked to give it up
    vm.go(until=lambda: "data" not in vm.plugged)

Source: ours.  Invariants: the VM's `Config` says at any time what is plugged in, so that a snapshot
makes the same board again; what could not be plugged in has changed nothing.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from understudy import outlets
from understudy.closed import says_closed
from understudy.config import Config
from understudy.devices.board import Row
from understudy.devices.pc import PC
from understudy.devices.pci_hotplug import PciHotplug
from understudy.devices.rtc import Rtc
from understudy.devices.virtio.net import Net
from understudy.devices.virtio.pci import VirtioPci
from understudy.devices.virtio.vsock import Vsock
from understudy.disk import Disk
from understudy.endings import Endings
from understudy.nic import Nic
from understudy.plug import KINDS, Thing, kind_of, named, parse
from understudy.share import Share
from understudy.tenant import Tenant, link, still
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import GuestClock


@says_closed()
class Pluggable(Tenant):
    """What a VM says and does of its slots."""

    config: Config
    clock: GuestClock
    pc: PC
    vcpus: list[Vcpu]
    endings: Endings

    def post(self, action: Callable[[], None]) -> None:
        """Do it between two exits."""
        raise NotImplementedError

    @property
    def plugged(self) -> list[str]:
        """The names of its disks, network cards and shared folders."""
        return [name for name, _ in named(self.config)]

    @still
    def plug(self, what: Thing | str) -> str:
        """Put in one of `KINDS`, or what a text like "disk=FILE" says; its name.

        ValueError, or ImageError, NetworkError, ShareError, VsockError, if that cannot be,
        RuntimeError if the VM was made without hot plug.  The guest's driver finds it in its own
        time; a folder is mounted by who wants it there: `mount -t virtiofs NAME /mnt`.
        """
        one, hotplug = parse(what) if isinstance(what, str) else what, self._hotplug()
        kind = kind_of(one)
        name = one.name or next(
            free for n in range(len(self.pc.parts)) if (free := f"{kind}{n}") not in self.pc.parts
        )
        if name in self.pc.parts:
            raise ValueError(f"{name!r} is plugged in already: choose another name=")
        one = replace(one, name=name, slot=self.pc.pci.free_device())
        config, field = self._pinned(), KINDS[kind][1]
        more: dict[str, Any] = {field: (*getattr(config, field), one)}
        config = replace(config, **more)
        with ExitStack() as given:
            row = self._row(name, config, one, given)
            part = self.pc.add(row[0], **row[1])
            given.pop_all()
        try:
            assert isinstance(part, VirtioPci)
            part.hide(config.hide_virtio)
            if isinstance(part, Net | Vsock):
                outlets.connect(self.pc, part, self.post)
            if isinstance(part, Net) and isinstance(one, Nic):
                part.set_link(is_up=one.kind != "none")
        except BaseException:
            self.pc.remove(name)
            raise
        self._have(config)
        hotplug.arrive(one.slot)
        return name

    def _row(self, name: str, config: Config, one: Thing, given: ExitStack) -> Row:
        """A row for it, with what `given` closes."""
        match one:
            case Disk():
                return outlets.disk_row(name, config, one, self.endings.request, given)
            case Nic():
                epoch_ns = self.pc.part("rtc", Rtc).epoch_ns
                return outlets.net_row(name, config, one, epoch_ns, self.clock, given)
            case Share():
                return outlets.share_row(name, config, one, given)
            case _:
                return outlets.vsock_row(name, one, given)

    @still
    def unplug(self, name: str) -> None:
        """Ask the guest to give up one of `plugged`; it goes when the guest agrees.

        ValueError if there is none of that name, RuntimeError if the VM was made without hot plug.
        """
        if name not in self.plugged:
            known = ", ".join(self.plugged) or "none is plugged in"
            raise ValueError(f"there is no disk, network card or folder {name!r}: {known}")
        self._hotplug().ask(self.pc.slots[name])

    def _ejected(self, slot: int) -> None:
        """The guest has given up what was in a slot."""
        name = next((name for name, its in self.pc.slots.items() if its == slot), "")
        if name not in self.plugged:
            return  # a snapshot said that this was asked for; nobody asks it of anything else
        config = self._pinned()
        left: dict[str, Any] = {
            field: tuple(one for one in getattr(config, field) if one.name != name)
            for _, field in KINDS.values()
        }
        publish = () if self._leads_outside(name) else config.publish
        self._have(replace(config, **left, publish=publish))
        self.pc.remove(name)

    def _leads_outside(self, name: str) -> bool:
        one = dict(named(self.config))[name]
        return isinstance(one, Nic) and one.kind == "user"

    def _hotplug(self) -> PciHotplug:
        if not self.config.hotplug:
            raise RuntimeError(
                f"{self.config.name} was made without hot plug: expected hotplug=True, or --hotplug"
            )
        return self.pc.part("pci_hotplug", PciHotplug)

    def _pinned(self) -> Config:
        """Its Config with the names and slots that things have now, whatever comes or goes."""
        config = self.config
        pinned: dict[str, Any] = {field: () for _, field in KINDS.values()}
        for name, one in named(config):
            pinned[KINDS[kind_of(one)][1]] += (replace(one, name=name, slot=self.pc.slots[name]),)
        return replace(config, **pinned)

    def _have(self, config: Config) -> None:
        self.config = config
        link(self.turns, config, self.vcpus)
