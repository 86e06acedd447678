"""A VM made of fakes, with a guest that has been entered in 64-bit mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.unit.fakes import FakeApic, FakeExit, FakeProcessor, Step, fake_machine
from understudy.arch.vmcs import Vmcs
from understudy.machine.p2m import GuestMemoryError
from understudy.paging.guest_walk import GuestFault
from understudy.verdict import Stop
from understudy.vm import VM

LONG_MODE = {
    "rip": 0x10_0000, "rsp": 0x8000, "rflags": 0x202, "cr0": 0x8001_0011, "cr3": 0x1000,
    "cr4": 0x20, "efer": 0x500,
}  # fmt: skip
CODE = 0x10_0000


@dataclass
class Bench:
    """A VM and its fakes under their own names."""

    vm: VM
    processor: FakeProcessor
    apic: FakeApic
    start: dict[str, int] = field(default_factory=dict)

    def play(self, *steps: Step) -> Stop:
        """Let the processor return these exits, then end the run."""
        self.processor.script.extend(steps)
        self.processor.script.append(FakeExit(0x10000))
        stop = self.vm.go()
        self.processor.in_guest = False
        return stop

    def field(self, which: Vmcs) -> int:
        return self.processor.vmcs.get(int(which), 0)

    @property
    def rip(self) -> int:
        return self.field(Vmcs.GUEST_RIP)

    @property
    def injected(self) -> int:
        return self.field(Vmcs.ENTRY_INTERRUPTION_INFORMATION)


@dataclass
class EntryLike:
    """What `VM.enter` needs of an Entry."""

    registers: dict[str, int]
    protocol: str = "test"


def patch_fetch(vm: VM, processor: FakeProcessor) -> None:
    """Let the processor find the guest's memory at linear addresses."""

    def fetch(gva: int, length: int) -> bytes:
        out = b""
        for n in range(length):
            try:
                out += vm.vcpus[0].translation().read(vm.memory, gva + n, 1, fetch=True)
            except (GuestFault, GuestMemoryError):
                break
        return out

    processor.fetch = fetch  # type: ignore[method-assign]


@contextmanager
def bench(
    registers: dict[str, int] | None = None, features: dict[str, bool] | None = None, **options: str
) -> Iterator[Bench]:
    """A VM that is ready to `play`, without a timer.  gva = gpa for the first gigabyte."""
    with fake_machine(features):
        vm = VM("16M", **options)  # type: ignore[arg-type]
        vm.bus.port_write(0x43, 1, 0x30)
        vm.memory.write_u64(0x1000, 0x2007)
        vm.memory.write_u64(0x2000, 0x87)
        vm.memory.write_u64(0x2018, 3 << 30 | 0x87)
        vm.enter(EntryLike(LONG_MODE | (registers or {})))  # type: ignore[arg-type]
        processor, apic = vm.processors[0], vm.vcpus[0].apic
        assert isinstance(processor, FakeProcessor)
        assert isinstance(apic, FakeApic)
        patch_fetch(vm, processor)
        yield Bench(vm, processor, apic)
