"""What a guest finds out about its processor's registers by trying: for tools/registers.py.

A few instructions of real-mode code read and write MSRs and control registers, and ask CPUID for
all of its leaves, in a VM.  Nothing is known beforehand but the registers' numbers.

Source: SDM 2, RDMSR, WRMSR, CPUID, "MOV - Move to/from Control Registers".
Invariant: after each question the registers are as before.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from understudy.arch.cr import CR4
from understudy.arch.exception import Vector
from understudy.arch.msr import Msr as Index
from understudy.execution.vmx.operation import PASSED
from understudy.vcpu.activity import Activity, Goal
from understudy.verdict import ASLEEP, OVER
from understudy.vm import VM

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
RAX, RCX, RDX, RBX, RSP, RBP = range(6)
LINEAR_BITS: Final = 48
TYPES: Final = range(8)  # memory types fill bytes
# Nothing lies at a power of two: some MSRs take an address, at which the hypervisor writes.
LEAVES_GPA, ANSWERS_GPA, VECTORS_GPA, STACK_GPA = 0x3100, 0x5100, 0x6100, 0x7F00
RDMSR, WRMSR, FAULT, CPUID, MOV_CR4, EVENT = range(0x7100, 0x7400, 0x80)
CODE: Final = {
    RDMSR: "0f32 f4",  # rdmsr; hlt
    WRMSR: "0f30 f4",  # wrmsr; hlt
    FAULT: "f4",  # hlt
    EVENT: "cf",  # iret
    MOV_CR4: "0f22e0 f4",  # mov cr4, eax; hlt
    CPUID: "be0031 bf0051"  # mov si, LEAVES; mov di, ANSWERS
    "668b04 668b4c04 0fa2"  # next: mov eax, [si]; mov ecx, [si+4]; cpuid
    "668905 66895d04 66894d08 6689550c"  # mov [di], eax; ebx, ecx, edx after it
    "83c608 83c710 3bf5 72de f4",  # add si, 8; add di, 16; cmp si, bp; jb next; hlt
}
IA32_APIC_BASE: Final = 0x1B
CANDIDATES: Final = frozenset({*PASSED, *Index})
Answer = tuple[int, ...]


class Msr(NamedTuple):
    """What was found out about one MSR."""

    number: int
    reset: int | None  # None: it cannot be read
    writable: int  # bits that keep what is written
    ignored: int  # bits that may be written, and stay as they are
    is_canonical: bool  # it takes canonical addresses only
    runs: bool  # by itself
    follows: tuple[tuple[int, str], ...]  # bits that change something else, and what


class Probe:
    """A VM whose guest asks, by one of its processors (`number`)."""

    def __init__(self, vm: VM, leaves: Iterable[tuple[int, int]], number: int = 0) -> None:
        self.vm, self.vcpu, self.leaves = vm, vm.vcpus[number], list(leaves)
        for at, code in CODE.items():
            vm.memory.write(at, bytes.fromhex(code))
        for vector in range(256):
            handler = FAULT if vector in (Vector.GP, Vector.UD) else EVENT
            vm.memory.write(VECTORS_GPA + 4 * vector, handler.to_bytes(4, "little"))
        for n, (leaf, subleaf) in enumerate(self.leaves):
            row = leaf.to_bytes(4, "little") + subleaf.to_bytes(4, "little")
            vm.memory.write(LEAVES_GPA + 8 * n, row)
        data = {f"{s}_attr": 0x93 for s in ("ds", "es", "ss", "fs", "gs")}
        limits = {f"{s}_limit": 0xFFFF for s in ("cs", "ds", "es", "ss", "fs", "gs")}
        self.vcpu.set_registers(
            {**data, **limits, "cs": 0, "cs_base": 0, "cs_attr": 0x9B, "cr0": 0x10, "rflags": 2,
             "rip": FAULT, "idtr_base": VECTORS_GPA, "idtr_limit": 0x3FF,
             "efer": 0, "cr4": 0}
        )  # fmt: skip
        self.still = self.others()
        self.still = {name: value for name, value in self.others().items()
                      if self.still[name] == value}  # fmt: skip

    def run(self, at: int, **registers: int) -> bool:
        """Execute the code there, to its HLT.  False if it faulted."""
        vcpu, guest = self.vcpu, self.vcpu.guest
        vcpu.leave_guest()
        vcpu.state.activity = Activity.ACTIVE
        guest.rip, guest.rflags = at, 2
        guest.set_gpr(RSP, STACK_GPA)
        for name, value in registers.items():
            guest.set_gpr({"eax": RAX, "ecx": RCX, "edx": RDX, "ebp": RBP}[name], value)
        while (end := vcpu.run(Goal())) is OVER:
            pass
        assert end is ASLEEP, end
        return guest.rip != FAULT + 1

    def read(self, index: int) -> int | None:
        """RDMSR; None for #GP(0)."""
        if not self.run(RDMSR, ecx=index):
            return None
        gpr = self.vcpu.guest.gpr
        return gpr(RDX) << 32 & MASK64 | gpr(RAX) & MASK32

    def write(self, index: int, value: int) -> bool:
        """WRMSR; False for #GP(0)."""
        return self.run(WRMSR, ecx=index, eax=value & MASK32, edx=value >> 32)

    def write_cr4(self, value: int) -> bool:
        """MOV to CR4; False for #GP(0)."""
        return self.run(MOV_CR4, eax=value)

    def cpuid(self) -> dict[tuple[int, int], Answer]:
        """Every leaf that was named: EAX, EBX, ECX, EDX."""
        assert self.run(CPUID, ebp=LEAVES_GPA + 8 * len(self.leaves))
        data = self.vm.memory.read(ANSWERS_GPA, 16 * len(self.leaves))
        words = [int.from_bytes(data[n : n + 4], "little") for n in range(0, len(data), 4)]
        return {leaf: tuple(words[4 * n : 4 * n + 4]) for n, leaf in enumerate(self.leaves)}

    def others(self) -> dict[str, int]:
        """What may follow an MSR: each bit of CPUID, and the bits that CR4 takes."""
        found = {}
        for (leaf, subleaf), answer in self.cpuid().items():
            for name, word in zip(("EAX", "EBX", "ECX", "EDX"), answer, strict=True):
                found[f"CPUID.{leaf:02X}H.{subleaf}:{name}"] = word
        return found

    def changed(self) -> tuple[str, ...]:
        """What is not as it was at first, with the bits that differ."""
        now = self.others()
        return tuple(
            f"{name}[{bits_of(now[name] ^ value)}]"
            for name, value in self.still.items()
            if now[name] != value
        )

    def candidates(self, reset: int, bit: int) -> Iterable[int]:
        """Values in which the bit is not what it is in `reset`: alone, or as a memory type."""
        yield reset ^ 1 << bit
        byte, mask = bit // 8 * 8, 0xFF << bit // 8 * 8
        for kind in TYPES:
            value = reset & ~mask | kind << byte
            if (value ^ reset) >> bit & 1:
                yield value

    def msr(self, index: int) -> Msr | None:
        """All about one MSR; None if there is none of that number."""
        reset = self.read(index)
        self.cpuid()  # takes time
        base, runs = reset or 0, self.read(index) != reset
        if reset is None and not self.write(index, 0):
            return None
        apic = self.vcpu.apic.save()
        writable = ignored = 0
        follows: list[tuple[int, str]] = []
        for bit in range(64):
            for value in self.candidates(base, bit):
                if not self.write(index, value):
                    continue
                kept = self.read(index)
                if kept is not None and (kept ^ base) >> bit & 1:
                    writable |= 1 << bit
                    follows += [(bit, what) for what in self.changed()]
                else:
                    ignored |= 1 << bit
                self.vcpu.apic.load(apic)
                self.vcpu.events.clear()
                self.vcpu.msrs.note_apic_base()
                if reset is not None and index != IA32_APIC_BASE:
                    assert self.write(index, reset), f"{index:#x} does not take {reset:#x} back"
                if writable >> bit & 1:
                    break
        upper = MASK64 & -1 << LINEAR_BITS - 1
        is_canonical = not (writable | ignored) & upper and self.write(index, upper)
        if is_canonical and reset is not None:
            self.write(index, reset)
        ignored &= ~writable
        return Msr(index, reset, writable, ignored, is_canonical, runs, tuple(follows))

    def cr4_follows(self) -> Iterable[tuple[str, str]]:
        """The bits of CR4 that change something else, by name, and what."""
        for field in CR4.FIELDS:
            if self.write_cr4(field.mask):
                yield from ((field.name, what) for what in self.changed())
                assert self.write_cr4(0)


def bits_of(value: int) -> str:
    """The numbers of the bits that are set, runs as `high:low`."""
    runs, bit = [], 63
    while bit >= 0:
        if value >> bit & 1:
            high = bit
            while bit > 0 and value >> bit - 1 & 1:
                bit -= 1
            runs.append(f"{high}:{bit}" if high != bit else str(bit))
        bit -= 1
    return ", ".join(runs)


def there(vm: VM, numbers: Iterable[int]) -> Iterator[int]:
    """Which of these MSRs there may be.  The VM is good for nothing else afterwards.

    Of those that exit the hypervisor says it, which is faster than asking in the guest.  Those
    that have a name in the manual the guest shall try.
    """
    msrs = vm.vcpus[0].msrs
    for index in numbers:
        if index in CANDIDATES:
            yield index
            continue
        for access in (msrs.read, partial(msrs.write, value=0)):
            with suppress(KeyError):
                access(index)
                yield index
                break
