"""A computer without a hypervisor: a processor that was never in VMX operation, on a PC's board.

Here the teaching kernel has level 0, its own page tables, GDT and IDT, and nobody between it and
the chips: the column "native" of published tables.  Ports lead outside a `silicon.Processor`, so
what is here is the bus, and the wire from the 8259s, which goes by way of the processor's APIC.

Source: silicon/src/cpu/io.rs, silicon/src/processor.rs ("bare mode").
Invariants: no VMCS is ever made, and the machine's own counts of entries and exits say so; time
passes as it does in a VM, so the guest executes the same instructions, to the last.  (Some that
exit from a VM are not among those that its processor has retired: HLT, MOV to CR8.)
"""

from collections.abc import Callable
from typing import Any, Final, Self

from understudy.arch.cr import RFLAGS
from understudy.arch.exit_reason import Reason
from understudy.arch.memory_map import usable
from understudy.arch.vmcs import IoAccess
from understudy.clock import Clock
from understudy.console import Console
from understudy.devices.pc import PC
from understudy.guests import loader
from understudy.guests.teaching import GUESTS
from understudy.instructions.port_strings import CYCLE_NS
from understudy.machine.host import BareMemory
from understudy.silicon import Exit, Memory, Processor
from understudy.verdict import Stop, StopKind

RAX: Final = 0
EOI, SPURIOUS, ENABLED = 0xB0, 0xF0, 0x1FF  # registers of a local APIC, and a value
LONGEST: Final = 10_000_000  # instructions between two looks at the clock, at most


class Ram(BareMemory):
    """A PC's memory without a VM: firmware tables are where a PC has them."""

    def ranges(self) -> list[tuple[int, int]]:
        """Usable RAM as (physical address, bytes)."""
        return usable(self.size)


class Tsc(Clock):
    """The processor's own time."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.processor = processor

    def now(self) -> int:
        return self.processor.tsc


class Computer:
    """One processor, memory, a board; `kernel` is loaded, and runs by `go`."""

    def __init__(self, kernel: str, memory: int = 32 << 20) -> None:
        self.memory = Memory(memory)
        self.processors = (Processor(self.memory),)
        self.processor = self.processors[0]
        self.clock, ram = Tsc(self.processor), Ram(self.memory)
        self.console = Console(lambda action: action(), _fail)
        self.is_asserted = self.is_raised = False  # by the 8259s; in the processor's APIC
        self.board = PC(
            self.clock, ram, power_off=_end, reset=_end, debug_exit=lambda code: _end(),
            deliver=lambda message: None, extint=self._wire, com1=self.console.transmit,
            com2=lambda data: None, ram_bytes=memory,
        )  # fmt: skip
        self.console.receive = self.board.com1.receive
        rsdp = self.board.install_tables()
        self.processor.apic.write(SPURIOUS, ENABLED, self.clock.now())
        entry = loader.load(ram, GUESTS[kernel].path, rsdp=rsdp)
        self.processor.set_registers(dict(entry.registers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give processor and memory back."""
        self.board.close()
        self.memory.close()

    @property
    def instructions(self) -> int:
        """Instructions retired."""
        return self.processor.retired

    def counts(self) -> dict[str, Any]:
        """As a VM's: what the machine has counted of entries into a guest, and exits."""
        found = self.processor.counters()
        exits = {**found["exits"], "entries": found["entries"]}
        return {"exits": {str(name): often for name, often in exits.items()}, "faults": {}}

    def go(self, *, budget: int, until: Callable[[], bool]) -> Stop:
        """Run until that is so."""
        end = self.instructions + budget
        while not until():
            if self.instructions >= end:
                return Stop(StopKind.BUDGET)
            self.clock.run_due()
            self._interrupt()
            deadline = self.clock.next_deadline()
            left = LONGEST if deadline is None else max(deadline - self.clock.now(), 1)
            exit = self.processor.run(1 if self.is_asserted or self.is_raised else left)
            match exit.reason:
                case Reason.PIO:
                    self._port(exit)
                case Reason.HALT if not self.is_asserted and not self.is_raised:
                    if deadline is None:
                        return Stop(StopKind.STUCK)
                    self.processor.advance(max(deadline - self.clock.now(), 0))
                case Reason.HALT | Reason.BUDGET | Reason.KICK:
                    pass
                case reason:
                    return Stop(StopKind.ERROR, f"a bare processor stopped for reason {reason:#x}")
        return Stop(StopKind.UNTIL)

    def _wire(self, level: bool) -> None:
        self.is_asserted = level

    def _interrupt(self) -> None:
        """What the 8259s ask for becomes the APIC's, as soon as the processor will take it."""
        apic = self.processor.apic
        if self.is_raised and apic.pending() < 0:
            self.is_raised = False
            apic.write(EOI, 0, self.clock.now())  # the guest says it to the 8259s alone
        if self.is_asserted and not self.is_raised and self._registers()["rflags"] & RFLAGS.IF.mask:
            self.is_raised = True
            apic.raise_vector(self.board.acknowledge())

    def _port(self, exit: Exit) -> None:
        """IN and OUT: a bus cycle."""
        access, processor = IoAccess(exit.qualification), self.processor
        assert not access.STRING, "the teaching kernel has no INS and OUTS"
        size = access.SIZE + 1
        mask, rax = (1 << 8 * size) - 1, processor.gpr(RAX)
        if access.IN:
            value = self.board.bus.port_read(access.PORT, size)
            processor.set_gpr(RAX, value if size == 4 else rax & ~mask | value & mask)
        else:
            self.board.bus.port_write(access.PORT, size, rax & mask)
        processor.set_registers({"rip": self._registers()["rip"] + exit.length})
        processor.advance(CYCLE_NS)

    def _registers(self) -> dict[str, int]:
        return self.processor.registers()


def _end() -> None:
    raise EOFError("the guest has switched the computer off")


def _fail(problem: Exception) -> None:
    raise problem
