"""Where a vCPU is: on a processor of its own for ever, or now on this one, now on none.

What of a guest is in its VMCS moves with that (VMCLEAR here, VMPTRLD and VMLAUNCH there); all else
is taken out of the processor and put into the next (`Processor.save_live`).  Who asks for a
register of a vCPU that is nowhere has it put onto the host's *desk*, a processor on which no guest
ever runs.

Source: SDM 3C, "Software Use of Virtual-Machine Control Structures", "Software Access to the VMCS",
"Guidelines for Use of the INVVPID Instruction", "Guidelines for Use of the INVEPT Instruction".

Invariants: a VMCS is active on one processor at most; what a processor may have cached of a vCPU
when it was there last is forgotten before the vCPU runs there again, if it was elsewhere meanwhile.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Final

from understudy.arch.vmcs import Vmcs
from understudy.execution.vmx.control_registers import ControlRegisters
from understudy.execution.vmx.operation import Operation
from understudy.execution.vmx.root import Root
from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.silicon import Exit, Processor

TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
ONE_ADDRESS, ONE_CONTEXT = 0, 1  # types of INVVPID and INVEPT
OWN_VPID: Final = 1  # on a processor of its own
PARKED: Final = tuple(int(field) for field in (
    Vmcs.GUEST_RFLAGS, Vmcs.GUEST_INTERRUPTIBILITY_STATE, Vmcs.GUEST_PENDING_DEBUG_EXCEPTIONS,
))  # fmt: skip
"""Fields that are asked for while the vCPU waits: whether an interrupt would wake it."""


class Ways:
    """To what is in one processor, fast."""

    def __init__(self, processor: Processor) -> None:
        self.read, self.write = processor.vmread, processor.vmwrite
        self.read_gpr, self.write_gpr = processor.gpr, processor.set_gpr
        self.advance = processor.advance
        self.read_tsc: Callable[[], int] = partial(attrgetter("tsc"), processor)
        self.arm = partial(processor.vmwrite, TIMER)
        self.count_retired: Callable[[], int] = partial(attrgetter("retired"), processor)


class Placement(Guest):
    """The fast ways to a guest's registers, which lead to where it is."""

    operation: Operation
    kept: ControlRegisters
    read: Callable[[int], int]
    write: Callable[[int, int], None]
    resume: Callable[[int], Exit]

    def __init__(self, host: Host, processor: Processor | None) -> None:
        """`processor`: its own; None: it shares those of the host, and is at the desk first."""
        Guest.__init__(self)
        self.host, self.is_at_home = host, processor is not None
        self.vpid = OWN_VPID if processor is not None else host.vpids.allocate()
        self._known: dict[Processor, Ways] = {}  # of processors on which it was
        self._last: Processor | None = None  # where it ran, and may have left translations
        self._base = 0  # instructions that it retired elsewhere, less those of others here
        self._live = b""  # what is in the processor, while it is on none
        self._parked: dict[int, int] = {}
        if processor is None:
            processor = host.desk.take(self.take_off)
            host.desk.clear(processor)
        self._processor: Processor | None = processor
        self._ways(processor)
        if not self.is_at_home:
            self._base = -processor.retired

    @property
    def processor(self) -> Processor:
        """The one on which the vCPU is; the desk if it was on none."""
        return self._processor or self._at_desk()

    @property
    def place_now(self) -> Processor | None:
        return self._processor

    def _ways(self, processor: Processor) -> None:
        ways = self._known.get(processor)
        if ways is None:
            ways = self._known[processor] = Ways(processor)
        self.read, self.write = ways.read, ways.write
        self.read_gpr, self.write_gpr = ways.read_gpr, ways.write_gpr
        self.advance, self.read_tsc, self.arm = ways.advance, ways.read_tsc, ways.arm
        self.count_retired = ways.count_retired if self.is_at_home else self._count

    def _tell(self) -> None:
        self.kept.read, self.kept.write = self.read, self.write
        self.moved()

    def _count(self) -> int:
        here = self._processor
        return self._base if here is None else self._base + here.retired

    # --- moving ---

    def place(self, processor: Processor) -> None:
        if self._processor is processor:
            return
        if self._processor is not None:
            self.take_off()
        operation = self.operation
        operation.use(Root.of(self.host, processor))
        processor.vmptrld(operation.vmcs)
        processor.load_live(self._live)
        self._processor = processor
        self._base -= processor.retired
        self._ways(processor)
        if processor is not self._last and not self.host.desk.is_at(processor):
            self._arrive(processor)
        self.resume = self.launch
        self._tell()

    def _arrive(self, processor: Processor) -> None:
        """It ran elsewhere meanwhile, and what changed there was not told here."""
        self.write(Vmcs.HOST_CR3, self.operation.root.table)
        processor.invvpid(ONE_CONTEXT, self.vpid)
        if self.view.eptp:
            processor.invept(ONE_CONTEXT, self.view.eptp)
        self._last = processor

    def take_off(self) -> None:
        processor = self._processor
        if processor is None:
            return
        if self.operation.root.takes_pmu_interrupt():  # of this vCPU, and of no other
            self.overflowed()
        self._parked = {field: self.read(field) for field in PARKED}
        self._live = processor.save_live()
        self._base += processor.retired
        processor.vmclear(self.operation.vmcs)
        self._processor = None
        if self.host.desk.is_at(processor):
            self.host.desk.left()
        self.read, self.write = self._read_away, self._write_away
        self.read_gpr, self.write_gpr = self._gpr_away, self._set_gpr_away
        self._tell()

    def leave_desk(self) -> None:
        """There is no vCPU after all."""
        self.host.desk.left()
        self.host.vpids.free(self.vpid)

    def _at_desk(self) -> Processor:
        desk = self.host.desk.take(self.take_off)
        self.place(desk)
        return desk

    def launch(self, budget: int) -> Exit:
        """The first entry is a VMLAUNCH, all others are VMRESUMEs."""
        exit = self.processor.vmlaunch(budget)
        if not exit.entry_failure:
            self.resume = self.processor.vmresume
        return exit

    # --- the ways while it is on no processor ---

    def _read_away(self, field: int) -> int:
        value = self._parked.get(field)
        return self._at_desk().vmread(field) if value is None else value

    def _write_away(self, field: int, value: int) -> None:
        self._at_desk().vmwrite(field, value)

    def _gpr_away(self, n: int) -> int:
        return self._at_desk().gpr(n)

    def _set_gpr_away(self, n: int, value: int) -> None:
        self._at_desk().set_gpr(n, value)

    # --- saving ---

    def save_place(self) -> dict[str, object]:
        """What is in the processor: all of it, if that is its own."""
        if self.is_at_home:
            return {"processor": self.processor.save().hex(), "live": "", "retired": 0}
        live = self._live if self._processor is None else self._processor.save_live()
        return {"processor": "", "live": live.hex(), "retired": self.retired}

    def load_place(self, saved: dict[str, str], retired: int) -> None:
        """Put that into the processor.  ValueError if it does not fit."""
        whole, live = bytes.fromhex(saved["processor"]), bytes.fromhex(saved["live"])
        processor = self.processor
        if self.is_at_home and whole:
            _load(processor, whole)
            processor.vmxoff()
            self.operation.root.enter()
            return
        if whole:
            made = Processor(self.host.memory)
            try:
                _load(made, whole)
                live, retired = made.save_live(), made.retired
            finally:
                made.close()
        processor.load_live(live)
        self._base, self._last = retired - processor.retired, None
        self.count_retired = self._count


def _load(processor: Processor, whole: bytes) -> None:
    processor.load(whole)
    if processor.in_guest:
        raise ValueError("snapshot: the processor was saved inside the guest")
