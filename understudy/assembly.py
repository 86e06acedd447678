"""How a VM's parts are put together: its board, its virtual processors, and the wires.

Source: ours.  Invariant: nothing here is needed once the VM runs; what the parts know of each
other, they were told here.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from understudy import outlets
from understudy.answers.control_registers import offer_efer
from understudy.arch.address import MAXPHYADDR, PAGE
from understudy.arch.cr import CR4
from understudy.config import Config, check_choice
from understudy.console import Console
from understudy.devices import Device
from understudy.devices.board import Row
from understudy.devices.kvmclock import MSRS as KVM_MSRS
from understudy.devices.pc import DEFAULT_EPOCH_NS, PC
from understudy.devices.virtio import rng
from understudy.devices.virtio.net import Net
from understudy.devices.virtio.pci import VirtioPci
from understudy.devices.virtio.rng import SEED_BYTES
from understudy.devices.virtio.vsock import Vsock as Vsocket
from understudy.devices.vmgenid import BYTES, FIRST, derived
from understudy.execution import Execution
from understudy.guest import Guest
from understudy.image_file import SnapshotError
from understudy.interrupts import Router
from understudy.machine.ballooned import Ballooned
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.paging import BUDGET, Paging
from understudy.paging.budget import Budgeted
from understudy.quantities import bytes_of
from understudy.sched.host import SharedHost
from understudy.silicon import Processor, host_features, wall_tsc
from understudy.telling import Translating
from understudy.vcpu.cpu_features import FEATURES, Choice, available
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop, StopKind
from understudy.visible import visible

ROOM: Final = 1 << 31  # beside the guest's RAM: alignment to a gigabyte, and the hypervisor's own
BESIDE: Final = 1 << 20  # that a VM needs for its processors, and to lend
STEAL: Final = "steal_time"
QUIET_END: Final = "pv_eoi"
VIRTIO: Final = [kind for kind in Device.ALL.values() if issubclass(kind, VirtioPci)]
ANY_CR4: Final = (1 << 64) - 1


def check_names(config: Config) -> None:
    """ValueError if a Config names what no room of this house has."""
    check_choice("execution", config.execution, Execution.ALL)
    for name in config.exits:
        check_choice("exits", name, Execution.ALL[config.execution].optional_exits)
    for name in config.hide_virtio:
        check_choice("hide_virtio", name, {one for kind in VIRTIO for one in kind.switches})
    check_choice("paging", config.paging, Paging.ALL | Paging.PV)
    check_choice(
        f"paging with execution {config.execution}", config.paging,
        Execution.ALL[config.execution].goes_with(),
    )  # fmt: skip
    shown = Choice.of(config.cpu).made(host_features(), ANY_CR4)
    technique = Execution.ALL[config.execution]
    if there := ", ".join(name for name in technique.cannot_hide if name not in shown):
        able = ", ".join(sorted(n for n, one in Execution.ALL.items() if not one.cannot_hide))
        raise ValueError(
            f"cpu {config.cpu!r}: execution {config.execution} cannot hide {there}, which a kernel "
            f"executes without a trap; expected one of {able}"
        )


def check_shared(config: Config) -> None:
    """ValueError if a Config cannot be that of a VM on a host whose processors VMs share."""
    technique = Execution.ALL[config.execution]
    if technique.needs_own_processor:
        able = sorted(name for name, one in Execution.ALL.items() if not one.needs_own_processor)
        raise ValueError(
            f"execution {config.execution!r}: it needs a processor for each vCPU, and this host's "
            f"are shared; expected one of {', '.join(able)}"
        )


def again(config: Config, engine: str | None, clone: int | None) -> Config:
    """That of a VM which is made of an image: what only one VM can have at a time, it has not."""
    net = tuple(replace(nic, pcap="") for nic in config.net)
    engine = engine or config.engine
    if clone is None:
        return replace(config, engine=engine, net=net)
    net = tuple(replace(n, kind="none", tap="") if n.kind == "tap" else n for n in net)
    vsock = tuple(replace(one, path="") for one in config.vsock)
    return replace(config, engine=engine, net=net, publish=(), vsock=vsock)


def with_paging(config: Config, name: str) -> Config:
    """The same VM with another paging technique.  ValueError if that cannot be."""
    check_choice("paging", name, Paging.ALL | Paging.PV)
    config = replace(config, paging=name)
    check_names(config)
    return config


def table_memory_of(config: Config) -> int:
    """The bytes that shadow tables may take, with what is noted of them."""
    if config.table_memory == "auto":
        return max(BUDGET, bytes_of(config.memory) // 4)
    return bytes_of(config.table_memory)


def overhead_of(config: Config) -> int:
    """The bytes of its host's memory that a VM needs beside its own."""
    own = bytes_of(config.memory) + config.rom
    is_shadow = issubclass(Paging.named(config.paging), Budgeted)
    execution = Execution.ALL[config.execution].beside * config.topology.count
    return BESIDE + execution + (table_memory_of(config) if is_shadow else own // 512)


def host_of(config: Config) -> Host:
    """A host for one VM alone."""
    return Host(bytes_of(config.memory) + table_memory_of(config) + ROOM, is_private=True)


def on_host(config: Config, host: Host | None) -> Config:
    """What a new VM shows its guest here, unless its CPU model names it.

    The time that it had no processor, on a host that shares them; ends of interrupts without an
    exit, in real time.  (Virtual time compares techniques: there an end is what hardware has.)
    """
    here = {STEAL: isinstance(host, SharedHost), QUIET_END: config.clock == "wall"}
    hidden = Choice.of(config.cpu).removed
    for name, is_so in here.items():
        if is_so and name not in config.cpu and hidden.isdisjoint(FEATURES[name].needs):
            config = replace(config, cpu=f"{config.cpu},+{name}")
    return config


def processors_of(
    config: Config, host: Host, given: ExitStack
) -> tuple[list[Processor], GuestClock]:
    """A processor for each vCPU, and the VM's clock; none on a host that has its own for all.

    ValueError if those are others than the VM was made for.
    """
    if isinstance(host, SharedHost):
        check_shared(config)
        for what, its in (("engine", host.engine), ("clock", host.clock)):
            if (asked := getattr(config, what)) != its:
                raise ValueError(f"{what} {asked!r}: expected {its!r}, which the host has")
        return [], host.schedule.clock()
    processors: list[Processor] = []
    for _ in config.topology.apic_ids:
        processors.append(host.plug(config.engine, config.clock))
        given.callback(host.unplug, processors[-1])
        if config.virtualizable_isa:
            processors[-1].set_ring0("code", "trap")
    bootstrap = processors[0]
    clock = GuestClock(wall_tsc if config.clock == "wall" else lambda: bootstrap.tsc)
    clock.offset = -clock.source()
    return processors, clock


def paging_of(config: Config, host: Host, memory: GuestMemory) -> Paging:
    """The paging technique that was chosen, with its tables."""
    technique, budget = Paging.named(config.paging), table_memory_of(config)
    return technique(host, memory.p2m, largest=config.largest_page, budget=budget)


def board_of(
    config: Config,
    clock: GuestClock,
    memory: GuestMemory,
    ballooned: Ballooned,
    router: Router,
    request: Callable[[Stop], None],
    console: Console,
    com2: Console,
    post: Callable[[Callable[[], None]], None],
    eject: Callable[[int], None],
) -> PC:
    """A PC, wired to the processors by `router`.  `request` ends the run; `eject`
    hears which slot the guest has given up.

    Its disks and folders are open, its cables plugged in; the board closes them.  ImageError,
    NetworkError or ShareError if one of them cannot be.
    """
    is_wall = config.clock == "wall"
    epoch_ns = time.time_ns() if is_wall else DEFAULT_EPOCH_NS
    last: list[Row] = [("virtio_balloon", {})] if config.balloon else []
    if config.has_virtio_agent:
        last.append(("virtio_agent", {}))
    with ExitStack() as given:
        rows = [
            *(outlets.disk_row(f"disk{n}", config, one, request, given)
              for n, one in enumerate(config.disks)),
            *(outlets.net_row(f"net{n}", config, one, epoch_ns, clock, given)
              for n, one in enumerate(config.net)),
            *(outlets.share_row(f"share{n}", config, one, given)
              for n, one in enumerate(config.folders)),
            *(outlets.vsock_row(f"vsock{n}", one, given) for n, one in enumerate(config.vsock)),
        ]  # fmt: skip
        fixed = (*config.devices, *last)
        board = PC(
            clock,
            memory,
            power_off=lambda: request(Stop(StopKind.POWEROFF)),
            reset=lambda: request(Stop(StopKind.RESET)),
            debug_exit=lambda code: request(Stop(StopKind.DEBUG_EXIT, f"code {code}", code)),
            deliver=router.deliver,
            extint=router.extint,
            com1=console.transmit,
            com2=com2.transmit,
            who=lambda: address_space(router.here().guest),
            ring=lambda: com2.receive(b"\n"),  # at once: a snapshot has it
            ram_bytes=memory.size,
            apic_ids=config.topology.apic_ids,
            epoch_ns=epoch_ns,
            generation=os.urandom(BYTES) if is_wall else FIRST,
            has_rom=config.rom > 0,
            entropy=os.urandom(SEED_BYTES) if is_wall else rng.FIRST,
            eject=eject if config.hotplug else None,
            # What does not move comes first where the rest may.
            devices=(*fixed, *rows) if config.hotplug else (*rows, *fixed),
        )
        given.pop_all()
    for part in board.parts.values():
        if isinstance(part, VirtioPci):
            part.hide(config.hide_virtio)
    for part in board.parts.values():
        if isinstance(part, Net | Vsocket):
            outlets.connect(board, part, post)
    for nic, card in outlets.cards_by_row(config, board):
        card.set_link(is_up=nic.kind != "none")
    for balloon in outlets.balloons_of(board):
        balloon.pages = ballooned
    console.receive, com2.receive = board.com1.receive, board.com2.receive
    return board


def address_space(guest: Guest) -> int:
    """What tells a guest's processes apart: the root of the page tables in use."""
    control = guest.paging_control()
    return control.cr3 & -PAGE if control.cr4 & CR4.PCIDE.mask else control.cr3


def guest_of(
    config: Config, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
    before: Execution | None = None,
) -> Execution:  # fmt: skip
    """A vCPU's guest as its technique keeps it.  `before`: the one that it is to take over from."""
    more = {} if before is None else {"before": before}
    guest = Execution.ALL[config.execution](
        host, processor, paging, model, keep_timer=config.clock != "wall", exits=config.exits,
        **more,
    )  # fmt: skip
    if config.keep_translations and isinstance(guest, Translating):
        guest.keep_translations()
    return guest


def vcpu_of(
    config: Config,
    host: Host,
    processors: Sequence[Processor],
    paging: Paging,
    memory: GuestMemory,
    board: PC,
    router: Router,
    posts: deque[Callable[[], None]],
    clock: GuestClock,
) -> Vcpu:
    """One more virtual processor, on a processor of its own if there are any."""
    number, is_wall = len(router.vcpus), config.clock == "wall"
    technique = Execution.ALL[config.execution]
    processor = processors[number] if processors else None
    cr4 = technique.cr4_available(processor or host.processors[0])
    topology = config.topology
    model = CpuModel(
        host_features(),
        shown_by(config.cpu, technique.hidden_features),
        topology.apic_id(number),
        MAXPHYADDR,
        cr4,
        topology,
    )
    guest = guest_of(config, host, processor, paging, model)
    vcpu = Vcpu(guest, model, clock, board.bus, memory, posts, is_wall=is_wall)
    vcpu.events.acknowledge = board.acknowledge
    vcpu.msrs.eoi = board.end_of_interrupt
    vcpu.msrs.interrupt_command = lambda icr: router.command(vcpu, icr)
    vcpu.kvm.kick_other = router.kick
    vcpu.kvm.steal = lambda: board.kvmclock.state.steal[number]
    vcpu.msrs.as_firmware_leaves_them()
    if is_wall:  # in virtual time every run is the same
        guest.stir(os.urandom(SEED_BYTES))
    offer_efer(vcpu)
    _offer_clock(board, number, vcpu)
    return vcpu


def shown_by(cpu: str, hidden: tuple[str, ...]) -> str:
    """A CPU model without these, unless a user asked for them."""
    choice = Choice.of(cpu)
    said = choice.added | choice.removed
    return ",".join([cpu, *(f"-{name}" for name in hidden if name not in said)])


def showing(config: Config, features: frozenset[str]) -> Config:
    """That of a VM whose guest has been shown these features, and is to be shown no others now.

    SnapshotError where they cannot be given.
    """
    host, technique = host_features(), Execution.ALL[config.execution]
    check_shown(features, features & available(host, ANY_CR4))
    here = Choice.of(shown_by(config.cpu, technique.hidden_features)).made(host, ANY_CR4)
    more = sorted(name for name in here - features if FEATURES[name].host)
    return replace(config, cpu=",".join([config.cpu, *(f"-{name}" for name in more)]))


def check_shown(features: frozenset[str], here: frozenset[str]) -> None:
    """A guest that has been shown these is shown them and no others.  SnapshotError if not."""
    if missing := ", ".join(sorted(features - here)):
        raise SnapshotError(
            f"the snapshot's guest has been shown {visible(missing)}: expected a computer and a "
            "CPU model (--cpu) that have them"
        )
    if more := ", ".join(sorted(here - features)):
        raise SnapshotError(f"the snapshot's guest has not been shown {more}, and would be now")


def tell_apart(config: Config, board: PC, vcpus: Iterable[Vcpu], clone: int | None) -> None:
    """A VM was made of an image: let its guest know if it is another one than that of the image.

    In virtual time the VM itself goes on, unless it is a clone, by number.  In real time it never
    does: nobody knows how often the image is used.  With a ROM no table tells of the number.
    Whoever is another one gets other numbers from RDRAND, too.  The cards of a clone have addresses
    of their own, and were unplugged for a moment.
    """
    for nic, card in outlets.cards_by_row(config, board):
        if nic.kind == "none":
            card.set_link(is_up=False)
        elif clone is not None:
            card.become_another(f"{card.state.own.hex()}/{clone}")
    if config.clock == "wall":
        generation, seed, clone = os.urandom(BYTES), os.urandom(SEED_BYTES), None
    elif clone is not None:
        generation = derived(board.vmgenid.state.generation, clone)
        seed = clone.to_bytes(SEED_BYTES, "little")
    else:
        return
    for vcpu in vcpus:
        vcpu.guest.stir(seed)
    for part in board.parts.values():
        if isinstance(part, rng.Rng):
            part.reseed(seed if clone is None else rng.derived(part.state.seed, clone))
    if not config.rom:
        board.vmgenid.renew(generation)


def _offer_clock(board: PC, number: int, vcpu: Vcpu) -> None:
    """KVM's clock, by its MSRs."""
    kvmclock = board.kvmclock
    for index in KVM_MSRS:
        vcpu.msrs.extra[index] = (
            lambda index=index: kvmclock.rdmsr(number, index),  # type: ignore[misc]
            lambda value, index=index: kvmclock.wrmsr(number, index, value),  # type: ignore[misc]
        )
