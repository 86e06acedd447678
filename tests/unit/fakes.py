"""A processor, memory and APIC without a machine behind them, for tests of single modules.

The processor's VMCS is a dictionary; its exits are a script.  What these fakes do is only what
`_silicon.pyi` promises, as simply as possible.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.vmcs import Vmcs

NEVER = (1 << 64) - 1
ALL32 = 0xFFFF_FFFF


class FakeMemory:
    """Sparse memory: a dictionary of pages."""

    is_here = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, bytearray] = {}

    def _page(self, number: int) -> bytearray:
        return self.pages.setdefault(number, bytearray(4096))

    def read(self, hpa: int, length: int) -> bytes:
        if hpa < 0 or hpa + length > self.size:
            raise IndexError(hpa)
        out = b""
        while length:
            part = min(length, 4096 - hpa % 4096)
            page = self.pages.get(hpa >> 12, bytes(4096))
            out += page[hpa % 4096 : hpa % 4096 + part]
            hpa, length = hpa + part, length - part
        return out

    def write(self, hpa: int, data: Any) -> None:
        data = bytes(data)
        if hpa < 0 or hpa + len(data) > self.size:
            raise IndexError(hpa)
        while data:
            part = min(len(data), 4096 - hpa % 4096)
            self._page(hpa >> 12)[hpa % 4096 : hpa % 4096 + part] = data[:part]
            hpa, data = hpa + part, data[part:]

    def read_u64(self, hpa: int) -> int:
        return int.from_bytes(self.read(hpa, 8), "little")

    def write_u64(self, hpa: int, value: int) -> None:
        self.write(hpa, value.to_bytes(8, "little"))

    def read_u32(self, hpa: int) -> int:
        return int.from_bytes(self.read(hpa, 4), "little")

    def write_u32(self, hpa: int, value: int) -> None:
        self.write(hpa, value.to_bytes(4, "little"))

    def exchange(self, hpa: int, byte: int) -> int:
        old = self.read(hpa, 1)[0]
        self.write(hpa, bytes([byte]))
        return old

    def fill(self, hpa: int, length: int, byte: int = 0) -> None:
        self.write(hpa, bytes([byte]) * length)

    def discard(self, hpa: int, length: int) -> None:
        for number in [n for n in self.pages if hpa >> 12 <= n < hpa + length >> 12]:
            del self.pages[number]

    def resident_bytes(self) -> int:
        return len(self.pages) * 4096

    def close(self) -> None:
        self.pages.clear()


@dataclass
class FakeExit:
    """An exit with the fields that matter to a test; the others are zero."""

    reason: int
    qualification: int = 0
    length: int = 0
    gla: int = 0
    gpa: int = 0
    intr_info: int = 0
    intr_error: int = 0
    idt_info: int = 0
    idt_error: int = 0
    instr_info: int = 0
    entry_failure: bool = False


Step = FakeExit | Callable[["FakeProcessor"], FakeExit]

CAPABILITIES = {
    Msr.IA32_FEATURE_CONTROL: 5,
    Msr.IA32_PAT: 0x0007_0406_0007_0406,
    Msr.IA32_VMX_BASIC: 1 << 55 | 1 << 54 | 6 << 50 | 4096 << 32 | 0x11,
    Msr.IA32_VMX_MISC: 5 | 1 << 5 | 1 << 6,
    Msr.IA32_VMX_CR0_FIXED0: 0x8000_0021,
    Msr.IA32_VMX_CR0_FIXED1: ALL32,
    Msr.IA32_VMX_CR4_FIXED0: 0x2000,
    Msr.IA32_VMX_CR4_FIXED1: 0x3727FF,
    Msr.IA32_VMX_TRUE_PINBASED_CTLS: ALL32 << 32 | 0x16,
    Msr.IA32_VMX_TRUE_PROCBASED_CTLS: ALL32 << 32 | 0x0400_6172,
    Msr.IA32_VMX_PROCBASED_CTLS2: ALL32 << 32,
    Msr.IA32_VMX_TRUE_EXIT_CTLS: ALL32 << 32 | 0x0003_6DFB,
    Msr.IA32_VMX_TRUE_ENTRY_CTLS: ALL32 << 32 | 0x0000_11FB,
}


class FakeProcessor:
    """Returns the exits of `script`, one for each entry; a callable step runs first."""

    def __init__(
        self, memory: Any = None, engine: str = "dbt", clock: str = "virtual", apic_id: int = 0
    ) -> None:
        self.memory = memory
        self.script: deque[Step] = deque()
        self.vmcs: dict[int, int] = {}
        self.written: list[int] = []  # encodings, in order
        self.msrs: dict[int, int] = {int(k): v for k, v in CAPABILITIES.items()}
        self.live = [0] * 16
        self.root_registers: dict[str, int] = {}
        self.tsc = self.retired = self.kicks = self.entries = 0
        self.in_guest = False
        self.invalidated: list[tuple[int, int]] = []
        self.calls: list[str] = []

    def _enter(self, budget: int) -> FakeExit:
        self.entries += 1
        if not self.script:
            raise AssertionError("the test's script has no further exit")
        step = self.script.popleft()
        exit = step(self) if callable(step) else step
        self.in_guest = exit.reason in (Reason.BUDGET, Reason.KICK)
        if not self.in_guest:  # SDM 3C, "VM Exits": the valid bit is cleared
            self.vmcs[Vmcs.ENTRY_INTERRUPTION_INFORMATION] = 0
        self.retired += 1
        self.tsc += 1
        return exit

    def run(self, budget: int = 0) -> FakeExit:
        assert self.in_guest
        self.calls.append("run")
        return self._enter(budget)

    def vmlaunch(self, budget: int = 0) -> FakeExit:
        self.calls.append("vmlaunch")
        return self._enter(budget)

    def vmresume(self, budget: int = 0) -> FakeExit:
        self.calls.append("vmresume")
        return self._enter(budget)

    def kick(self) -> None:
        self.kicks += 1

    def close(self) -> None:
        self.calls.append("close")

    def vmread(self, field: int) -> int:
        assert not self.in_guest
        return self.vmcs.get(int(field), 0)

    def vmwrite(self, field: int, value: int) -> None:
        assert not self.in_guest
        assert 0 <= value < 1 << 64
        self.written.append(int(field))
        self.vmcs[int(field)] = value

    def vmxon(self, hpa: int) -> None:
        self.calls.append("vmxon")

    def vmxoff(self) -> None:
        self.calls.append("vmxoff")

    def vmclear(self, hpa: int) -> None:
        self.calls.append("vmclear")

    def vmptrld(self, hpa: int) -> None:
        self.calls.append("vmptrld")

    def invept(self, type: int, eptp: int) -> None:
        self.invalidated.append((type, eptp))

    def invvpid(self, type: int, vpid: int, gva: int = 0) -> None:
        self.invalidated.append((type, vpid))

    def flush(self) -> None:
        self.invalidated.append((0, 0))

    def fetch(self, gva: int, length: int) -> bytes:
        """Set by whoever has a guest with memory."""
        raise NotImplementedError

    def fxsave(self) -> bytes:
        return bytes(512)

    def ymm(self, number: int) -> bytes:
        return bytes(32)

    def set_ymm(self, number: int, value: bytes) -> None:
        assert number < 16 and len(value) == 32

    def protection_keys(self) -> tuple[int, int]:
        return (0, 0)

    def stir(self, bytes: bytes) -> None:
        assert len(bytes) == 32

    def gpr(self, n: int) -> int:
        return self.live[n]

    def set_gpr(self, n: int, value: int) -> None:
        assert 0 <= value < 1 << 64
        self.live[n] = value

    def gprs(self) -> tuple[int, ...]:
        return tuple(self.live)

    def set_gprs(self, values: tuple[int, ...]) -> None:
        self.live = list(values)

    def registers(self) -> dict[str, int]:
        return {"xcr0": 1} | self.root_registers

    def set_registers(self, values: dict[str, int]) -> None:
        self.root_registers |= values

    def rdmsr(self, index: int) -> int:
        return self.msrs.get(int(index), 0)

    def wrmsr(self, index: int, value: int) -> None:
        self.msrs[int(index)] = value

    def advance(self, ticks: int) -> int:
        assert ticks > 0
        self.tsc += ticks
        return self.tsc

    def counters(self) -> dict[str, Any]:
        return {
            "instructions": self.retired, "exits": {}, "entries": self.entries,
            "tlb_misses": 0, "itlb_misses": 0, "walk": {"guest": {1: 2}, "host": {}},
            "walk_caches": {"structures": {"hits": {}, "misses": 0},
                            "nested": {"hits": 0, "misses": 0}},
            "injected": {}, "engine": {},
        }  # fmt: skip


class FakeApic:
    """An APIC that holds a set of vectors; no priorities but the highest first."""

    def __init__(self, apic_id: int = 0, bootstrap: bool = True) -> None:
        self.irr: set[int] = set()
        self.accepted: list[int] = []
        self.timer = NEVER
        self.ticked: list[int] = []
        self.extint_open = True
        self.tpr = 0
        self.base = 0xFEE0_0900
        self.lints: list[tuple[int, bool]] = []
        self.registers: dict[int, int] = {}
        self.eois: list[int] = []

    def save(self) -> bytes:
        return b""

    def pending(self) -> int:
        return max(self.irr, default=-1)

    def accept(self) -> int:
        vector = max(self.irr)
        self.irr.discard(vector)
        self.accepted.append(vector)
        return vector

    def raise_vector(self, vector: int, level: bool = False) -> None:
        self.irr.add(vector)

    def lint(self, pin: int, asserted: bool) -> None:
        self.lints.append((pin, asserted))

    def performance_interrupt(self) -> bool:
        self.lints.append((2, True))
        return False

    def deadline(self) -> int:
        return self.timer

    def tick(self, now: int) -> None:
        self.ticked.append(now)
        if self.timer <= now:
            self.timer = NEVER
            self.irr.add(0xEC)

    def rdmsr(self, index: int, now: int) -> int:
        return self.timer if index == Msr.IA32_TSC_DEADLINE else self.registers[index]

    def wrmsr(self, index: int, value: int, now: int) -> int | None:
        if index == Msr.IA32_TSC_DEADLINE:
            self.timer = value or NEVER
        elif index == Msr.IA32_APIC_BASE:
            self.base = value
        else:
            self.registers[index] = value
        return None

    def read(self, offset: int, now: int) -> int:
        return self.registers.get(offset, 0)

    def write(self, offset: int, value: int, now: int) -> int | None:
        self.registers[offset] = value
        return None

    def take_eois(self) -> list[int]:
        eois, self.eois = self.eois, []
        return eois


@contextmanager
def fake_machine(features: dict[str, bool] | None = None) -> Iterator[None]:
    """Inside, `VM` and `Host` are made of fakes."""
    with (
        patch("understudy.machine.host.Memory", FakeMemory),
        patch("understudy.machine.host.Processor", FakeProcessor),
        patch("understudy.vcpu.loop.LocalApic", FakeApic),
        patch("understudy.assembly.host_features", lambda: features or {}),
    ):
        yield
