"""Disks and network cards that come and go while a VM runs.

    vm.plug(Disk("data.img", name="data"))
    vm.unplug("data")                               # the guest is asked to give it up
    vm.go(until=lambda: "data" not in vm.plugged)

Source: ours.  Invariants: the VM's `Config` says at any time what is plugged in, so that a snapshot
makes the same board again; what could not be plugged in has changed nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from understudy import assembly
from understudy.closed import says_closed
from understudy.config import Config
from understudy.devices.pc import PC
from understudy.devices.pci_hotplug import PciHotplug
from understudy.devices.rtc import Rtc
from understudy.devices.virtio.net import Net
from understudy.devices.virtio.pci import VirtioPci
from understudy.disk import Disk
from understudy.endings import Endings
from understudy.nic import Nic
from understudy.slot import Slotted
from understudy.tenant import Tenant, link, still
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import GuestClock

Slot = TypeVar("Slot", bound=Slotted)


def parse(text: str) -> Disk | Nic:
    """What is to be plugged in, as on the command line: disk=FILE,… or net=KIND,…"""
    kind, is_set, what = text.partition("=")
    if not is_set or kind not in ("disk", "net"):
        raise ValueError(f"{text!r}: expected disk=FILE[,OPTIONS] or net=KIND[,OPTIONS]")
    return Disk.parse(what) if kind == "disk" else Nic.parse(what)


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
        """The names of its disks and network cards."""
        return [name for name, _ in _named("disk", self.config.disks)] + [
            name for name, _ in _named("net", self.config.net)
        ]

    @still
    def plug(self, what: Disk | Nic | str) -> str:
        """Put in a disk or a network card, or what a text like "disk=FILE" says; its name.

        ValueError, ImageError or NetworkError if that cannot be, RuntimeError if the VM was made
        without hot plug.  The guest's driver finds it in its own time.
        """
        one, hotplug = parse(what) if isinstance(what, str) else what, self._hotplug()
        kind = "disk" if isinstance(one, Disk) else "net"
        name = one.name or next(
            free for n in range(len(self.pc.parts)) if (free := f"{kind}{n}") not in self.pc.parts
        )
        if name in self.pc.parts:
            raise ValueError(f"{name!r} is plugged in already: choose another name=")
        one = replace(one, name=name, slot=self.pc.pci.free_device())
        config = self._pinned()
        if isinstance(one, Disk):
            config = replace(config, disks=(*config.disks, one))
        else:
            config = replace(config, net=(*config.net, one))
        with ExitStack() as given:
            if isinstance(one, Disk):
                row = assembly.disk_row(name, config, one, self.endings.request, given)
            else:
                epoch_ns = self.pc.part("rtc", Rtc).epoch_ns
                row = assembly.net_row(name, config, one, epoch_ns, self.clock, given)
            part = self.pc.add(row[0], **row[1])
            given.pop_all()
        assert isinstance(part, VirtioPci)
        part.hide(config.hide_virtio)
        if isinstance(part, Net) and isinstance(one, Nic):
            assembly.connect(self.pc, part, self.post)
            part.set_link(is_up=one.kind != "none")
        self._have(config)
        hotplug.arrive(one.slot)
        return name

    @still
    def unplug(self, name: str) -> None:
        """Ask the guest to give up a disk or a network card; it goes when the guest agrees.

        ValueError if there is none of that name, RuntimeError if the VM was made without hot plug.
        """
        if name not in self.plugged:
            known = ", ".join(self.plugged) or "none is plugged in"
            raise ValueError(f"there is no disk or network card {name!r}: {known}")
        self._hotplug().ask(self.pc.slots[name])

    def _ejected(self, slot: int) -> None:
        """The guest has given up what was in a slot."""
        name = next((name for name, its in self.pc.slots.items() if its == slot), "")
        if name not in self.plugged:
            return  # a snapshot said that this was asked for; nobody asks it of anything else
        config = self._pinned()
        self._have(
            replace(
                config,
                disks=tuple(one for one in config.disks if one.name != name),
                net=tuple(one for one in config.net if one.name != name),
                publish=() if self._leads_outside(name) else config.publish,
            )
        )
        self.pc.remove(name)

    def _leads_outside(self, name: str) -> bool:
        return any(one.kind == "user" for its, one in _named("net", self.config.net) if its == name)

    def _hotplug(self) -> PciHotplug:
        if not self.config.hotplug:
            raise RuntimeError(
                f"{self.config.name} was made without hot plug: expected hotplug=True, or --hotplug"
            )
        return self.pc.part("pci_hotplug", PciHotplug)

    def _pinned(self) -> Config:
        """Its Config with the names and slots that things have now, whatever comes or goes."""
        config, slots = self.config, self.pc.slots
        return replace(
            config,
            disks=tuple(_at(slots, *one) for one in _named("disk", config.disks)),
            net=tuple(_at(slots, *one) for one in _named("net", config.net)),
        )

    def _have(self, config: Config) -> None:
        self.config = config
        link(self.turns, config, self.vcpus)


def _named(kind: str, ones: Sequence[Slot]) -> Iterator[tuple[str, Slot]]:
    for number, one in enumerate(ones):
        yield one.name or f"{kind}{number}", one


def _at(slots: dict[str, int], name: str, one: Slot) -> Slot:
    return replace(one, name=name, slot=slots[name])
