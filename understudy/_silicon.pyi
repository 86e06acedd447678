"""The data sheet of the machine: everything that Python may ask of the silicon.

Only `understudy/silicon.py` imports the compiled module.  Addresses are plain integers:
`hpa` is host-physical (an offset into a `Memory`), `gpa` guest-physical, `gva` guest-virtual.
VMCS fields are named by their encodings (SDM 3D, "Field Encoding in VMCS").
"""

from collections.abc import Sequence
from typing import Any, Self, final

from typing_extensions import Buffer

class VmFail(Exception):
    """A VMX instruction failed (SDM 3C, "Conventions").

    `number` is the VM-instruction error; 0 stands for VMfailInvalid (no current VMCS).
    """

    number: int

@final
class Memory:
    """Host-physical memory: one sparse memfd.  An unused or discarded frame costs nothing.

    Supports the buffer protocol (`memoryview(memory)`): for looking, and for writing before
    the processor runs.  While processors run, write with `write`, which tells them about code.
    """

    def __new__(cls, size: int) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def close(self) -> None:
        """Give the memory, its mapping and its descriptor back at once, whoever still refers to it,
        and close the processors made on it.

        Any later use raises RuntimeError; closing again does nothing.  BufferError while a
        memoryview of it is alive, RuntimeError while one of its processors runs: then all stays.
        """
    @property
    def is_here(self) -> bool:
        """Whether it was made in this process, and not in one that this was forked from."""
    @property
    def size(self) -> int:
        """Bytes, a multiple of 4096."""
    @property
    def fd(self) -> int:
        """The memfd, to hand to another process."""
    def read(self, hpa: int, length: int) -> bytes:
        """Raises IndexError if [hpa, hpa+length) is not all inside the memory."""
    def write(self, hpa: int, data: Buffer) -> None: ...
    def gather(self, runs: Sequence[tuple[int, int]]) -> bytes:
        """The bytes of several runs (hpa, length), one after the other, in one call."""
    def scatter(self, runs: Sequence[tuple[int, int]], data: bytes) -> None:
        """Write bytes to several runs (hpa, length), which they fill.

        ValueError if they do not, IndexError if a run is outside: then nothing is written.
        """
    def read_u64(self, hpa: int) -> int: ...
    def write_u64(self, hpa: int, value: int) -> None: ...
    def read_u32(self, hpa: int) -> int: ...
    def write_u32(self, hpa: int, value: int) -> None: ...
    def exchange(self, hpa: int, byte: int) -> int:
        """Put a byte, and return the one before, in one step for processors that run."""
    def fill(self, hpa: int, length: int, byte: int = 0) -> None: ...
    def discard(self, hpa: int, length: int) -> None:
        """Give whole 4-KByte frames back to the computer; they read as zero."""
    def alike(self, pairs: list[tuple[int, int]]) -> bytes:
        """One byte for each pair of frames (pfn): 1 if both have the same contents.

        Holes stay holes.  IndexError if one of them is outside.
        """
    def resident_bytes(self) -> int:
        """What the computer really spends on this memory."""
    def dirty(self, pfn: int, count: int, clear: bool = True) -> bytes:
        """One byte a frame: 1 if a processor or `write` changed it since last cleared.

        What processors write from now on, those that run in other threads too, is marked again.
        """
    def hash(self, hpa: int, length: int) -> int:
        """A 64-bit hash of the bytes (for comparing machines)."""

@final
class Exit:
    """Why `run` came back.  The VM-exit information fields of the VMCS, read once.

    `reason` is the SDM's basic exit reason (3D, "VMX Basic Exit Reasons"), or one of ours:
    0x10000 BUDGET  the instruction budget is used up (still in the guest; `run` goes on)
    0x10001 KICK    `kick` was called (still in the guest; `run` goes on)
    0x10002 HALT    bare mode only: HLT, and nothing can wake the processor before `wake_tsc`
    0x10003 SHUTDOWN bare mode only: triple fault
    0x10004 MMIO    bare mode only: access to a host-physical address without memory
    0x10005 PIO     bare mode only: IN/OUT; qualification as for exit reason 30
    0x10006 EVENT   `set_ring0("host")`: an event leads to CPL 0: intr_info and intr_error as in an
            exit; qualification: the address of a page fault, the DR6 bits of a debug exception;
            length: that of INT n, INT3, INTO, INT1.  Not delivered.
    0x10007 LOST    a defect of the engine: it faulted at the host address in `qualification`
    0x10008 SENSITIVE  `set_ring0` with "stop": a sensitive instruction of this length is next.

    After `set_ring0("host")` all of them have RIP in gla and RFLAGS in gpa, outside VMX non-root
    operation.
    """

    reason: int
    entry_failure: bool  # bit 31 of the exit reason
    qualification: int
    length: int  # VM-exit instruction length
    gla: int  # guest-linear address
    gpa: int  # guest-physical address
    intr_info: int  # VM-exit interruption information
    intr_error: int
    idt_info: int  # IDT-vectoring information
    idt_error: int
    instr_info: int  # VM-exit instruction information

@final
class Processor:
    """One x86-64 processor with VMX, at reset, on a `Memory`.

    Time: the TSC runs at 1 GHz.  clock="virtual": one tick for each instruction retired, plus
    what `advance` adds.  clock="wall": the computer's monotonic clock.

    Between exits the guest's general registers, x87/SSE state, CR2, DR0-3 and DR6 stay in the
    processor (as on real hardware); all else of the guest is in the VMCS.
    """

    def __new__(
        cls, memory: Memory, engine: str = "dbt", clock: str = "virtual", apic_id: int = 0
    ) -> Self:
        """engine: "dbt" (fast) or "reference" (the plain interpreter)."""
    def close(self) -> None:
        """Give back at once everything that the processor has, whoever still refers to it.

        Any later use raises RuntimeError, but to `kick` it or to close it again does nothing.
        RuntimeError if it is running in another thread.
        """
    # --- running ---
    def run(self, budget: int = 0) -> Exit:
        """Execute, in whatever mode the processor is, at most `budget` instructions (0: no limit).

        Releases the GIL; polls Python's signals a hundred times a second.
        """
    def vmlaunch(self, budget: int = 0) -> Exit:
        """VMLAUNCH, then run.  Raises VmFail; a failed entry check on guest state is an Exit."""
    def vmresume(self, budget: int = 0) -> Exit: ...
    def kick(self) -> None:
        """Make `run` return soon; callable from any thread.

        Within about a millisecond; within one block of code once two processors of the memory have
        run at the same time.

        In VMX non-root operation with external-interrupt exiting: exit reason 1, valid bit of
        intr_info clear.  Otherwise a KICK stop.
        """
    @property
    def in_guest(self) -> bool:
        """Whether the processor is in VMX non-root operation (after a BUDGET or KICK stop)."""
    # --- VMX instructions (SDM 3D, "VMX Instruction Reference") ---
    def vmxon(self, hpa: int) -> None: ...
    def vmxoff(self) -> None: ...
    def vmclear(self, hpa: int) -> None: ...
    def vmptrld(self, hpa: int) -> None: ...
    def vmptrst(self) -> int: ...
    def vmread(self, field: int) -> int: ...
    def vmwrite(self, field: int, value: int) -> None: ...
    def invept(self, type: int, eptp: int) -> None: ...
    def invvpid(self, type: int, vpid: int, gva: int = 0) -> None: ...
    # --- registers ---
    def gpr(self, n: int) -> int:
        """0 RAX 1 RCX 2 RDX 3 RBX 4 RSP 5 RBP 6 RSI 7 RDI 8..15 R8..R15.

        After a VM exit RSP here is the host's: the guest's is VMCS field 0x681C.
        """
    def set_gpr(self, n: int, value: int) -> None: ...
    def gprs(self) -> tuple[int, ...]: ...
    def set_gprs(self, values: tuple[int, ...]) -> None: ...
    def fxsave(self) -> bytes:
        """512 bytes, FXSAVE64 format."""
    def fxrstor(self, image: bytes) -> None:
        """The reverse; upper halves of YMM registers stay."""
    def ymm(self, number: int) -> bytes:
        """A YMM register: 32 bytes.  ValueError if there is no such one."""
    def set_ymm(self, number: int, value: bytes) -> None:
        """Set one."""
    def protection_keys(self) -> tuple[int, int]:
        """PKRU and IA32_PKRS."""
    def save_live(self) -> bytes:
        """What VM exits leave of a guest in the processor, and no VMCS holds: general registers,
        vector state, XCR0, PKRU, CR2, DR0-3, DR6, IA32_STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE,
        TSC_AUX, XSS, PKRS, the performance counters, and what random numbers follow from."""
    def load_live(self, state: bytes) -> None:
        """Let that be in this processor.  ValueError if it is nothing of the kind."""
    def stir(self, bytes: bytes) -> None:
        """Stir 32 bytes into what the numbers of RDRAND and RDSEED follow from."""
    def registers(self) -> dict[str, int]:
        """Everything live in the processor now, by SDM names in lower case: rax … r15, rip,
        rflags, cr0, cr2, cr3, cr4, cr8, efer, dr0 … dr7, es, cs, … with _base _limit _attr,
        ldtr, tr, gdtr_base, gdtr_limit, idtr_base, idtr_limit, and MSRs by name."""
    def set_registers(self, values: dict[str, int]) -> None:
        """Set some of them (bare mode).  Raises KeyError for a name that is none."""
    def rdmsr(self, index: int) -> int:
        """The processor's own MSR, as RDMSR in root mode would.  KeyError if there is none."""
    def wrmsr(self, index: int, value: int) -> None: ...
    def set_cpuid(self, leaf: int, subleaf: int, eax: int, ebx: int, ecx: int, edx: int) -> None:
        """What CPUID shows in root mode (in a guest it always exits)."""
    # --- address translation ---
    def translate(self, gva: int) -> int | None:
        """The host-physical address behind a linear address, now; no side effects, not counted."""
    def read_linear(self, gva: int, length: int) -> bytes:
        """Memory at a linear address, through the live tables.  ValueError if unmapped."""
    def walk(
        self, gva: int, cr3: int, cr4: int, efer: int, eptp: int = 0
    ) -> list[tuple[str, int, int, int]]:
        """Every reference of a page walk in order: (dimension "guest"|"host", level, hpa, entry).

        No side effects, not counted.  eptp 0: one dimension."""
    def fetch(
        self,
        gva: int,
        length: int,
        cr0: int | None = None,
        cr3: int | None = None,
        cr4: int | None = None,
        efer: int | None = None,
        eptp: int | None = None,
    ) -> bytes:
        """The bytes of code at a linear address, as the guest of the current VMCS translates it: as
        many of `length` (at most 64) as are mapped, at whatever privilege level.

        Right after a VM exit, too, through the guest's own tables and the EPT, if it is on.  What
        is given replaces the guest's own register (eptp 0: no EPT); with a cr3 the PDPTEs of PAE
        paging are read there.  No side effects, not counted.  VmFail if something is neither given
        nor in a current VMCS."""
    def flush(self) -> None:
        """Drop all cached translations (of memory and of code).  For host-side changes."""
    def use_windows(self, which: str) -> None:
        """Which programs access memory through windows of the computer's own page tables.

        which: "auto" (at first: those that compute), "always" or "never"; may be called between two
        runs.  Only speed depends on it, and the engine's counts windows_opened, window_fills,
        window_drops and window_strays.  ValueError for another word.
        """
    def set_ring0(self, who: str, sensitive: str) -> None:
        """Who is at CPL 0, outside VMX non-root operation.

        "code": nobody else.  "host": software outside, with an IDT of its own whose gates all have
        DPL 3 and lead to CPL 0.  An event at CPL 1 to 3 ends the run with EVENT then, and CPUID is
        #GP(0) there, as with CPUID faulting on.

        sensitive: what becomes, above CPL 0, of instructions that are sensitive but not privileged:
        "silent" (IA-32: they execute), "trap" (#GP(0)), or "stop" (the run ends before one, at CPL
        1 and 2).  No processor state: it is not saved.  ValueError for another word.
        """
    @property
    def ring0(self) -> tuple[str, str]:
        """What `set_ring0` was told last; ("code", "silent") at first."""
    def invlpg(self, gva: int) -> None:
        """INVLPG, as software at CPL 0 executes it."""
    def set_walk_caches(self, structures: int, nested: int) -> None:
        """Translation caches of the page walker, off (0) at first; may be called between two runs.

        structures: entries of each level's paging-structure cache, which holds where the table
        below an entry is (in a guest under EPT: its host-physical address).  nested: entries of
        the nested TLB, which holds pages of the EPT.  Only the number of references changes.
        """
    # --- time and interrupts ---
    @property
    def tsc(self) -> int:
        """The processor's TSC (without any VMCS offset), in ns."""
    def advance(self, ticks: int) -> int:
        """Virtual clock only: idle time passes.  Returns the TSC then."""
    @property
    def retired(self) -> int:
        """Instructions retired since reset."""
    @property
    def apic(self) -> LocalApic:
        """The processor's own local APIC (bare mode)."""
    # --- counting, saving ---
    def counters(self) -> dict[str, Any]:
        """{"instructions", "exits": {reason: n}, "entries", "tlb_misses", "itlb_misses",
        "walk": {"guest": {level: n}, "host": {level: n}}, "injected": {vector: n},
        "walk_caches": {"structures": {"hits": {level: n}, "misses"}, "nested": {"hits", "misses"}},
        "engine": {"translated_blocks", "translated_instructions", "invalidated", "slow_path", ...}}

        All but "engine" are the same for every engine."""
    def save(self) -> bytes:
        """The whole processor, between two `run`s (memory not included)."""
    def load(self, state: bytes) -> None: ...
    def state_hash(self) -> int:
        """A 64-bit hash of registers, x87/SSE state, system state and counters."""

@final
class LocalApic:
    """A local APIC (SDM 3A, "Advanced Programmable Interrupt Controller").

    Every Processor has one; a hypervisor may make more as virtual ones.  Times are TSC ticks
    (ns), passed in: it keeps no clock.
    """

    def __new__(cls, apic_id: int = 0, bootstrap: bool = True) -> Self: ...
    def read(self, offset: int, now: int) -> int:
        """A register by its xAPIC page offset (0x20 ID, 0x30 version, 0x80 TPR, …)."""
    def write(self, offset: int, value: int, now: int) -> int | None:
        """Returns the ICR (64 bits) if an interrupt command leaves this APIC, else None."""
    def rdmsr(self, index: int, now: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC 0x800-0x8FF.  KeyError means #GP(0)."""
    def wrmsr(self, index: int, value: int, now: int) -> int | None: ...
    def raise_vector(self, vector: int, level: bool = False) -> None:
        """An interrupt message arrives (fixed delivery)."""
    def lint(self, pin: int, asserted: bool) -> None:
        """LINT0 (ExtINT from the 8259s on a PC) or LINT1."""
    def performance_interrupt(self) -> bool:
        """The performance counters interrupt, as LVT PC says.  True if that is an NMI."""
    def pending(self) -> int:
        """The vector that would be delivered now, or -1.  (ExtINT: see `extint_open`.)"""
    @property
    def extint_open(self) -> bool:
        """Whether LVT LINT0 (or a disabled APIC) lets the 8259's interrupt through."""
    @property
    def ends_quietly(self) -> bool:
        """Whether the EOI of what is in service brings nothing about but that it has ended."""
    def accept(self) -> int:
        """Interrupt acknowledge: moves the pending vector from IRR to ISR and returns it."""
    def tick(self, now: int) -> None:
        """Let the timer act on the time that has passed."""
    def deadline(self) -> int:
        """The TSC at which `tick` must next be called; 2**64-1 if never."""
    def take_eois(self) -> list[int]:
        """Level-triggered vectors whose EOI is to be broadcast to I/O APICs."""
    @property
    def tpr(self) -> int: ...
    @tpr.setter
    def tpr(self, value: int) -> None: ...
    @property
    def base(self) -> int:
        """IA32_APIC_BASE."""
    def save(self) -> bytes: ...
    def load(self, state: bytes) -> None: ...

LAYOUTS: dict[str, list[tuple[str, int, int]]]
"""Bit layouts of the Rust half: name -> [(field, high bit, low bit)], for the agreement test."""

def hold_signals() -> None:
    """See to it that this thread's SIGSEGV, SIGBUS, SIGFPE and SIGILL come to the machine first.

    A guest's fault in generated code arrives as such a signal.  Handlers that others installed get
    all that is not a guest's.  While a processor runs, the machine looks again about every
    millisecond; before a run, whoever starts it calls this.
    """

def wall_tsc() -> int:
    """The TSC of every processor with clock="wall", now: no processor is asked."""

def host_features() -> dict[str, bool]:
    """What this computer's processor offers to the engine (sse42, avx, bmi1, bmi2, …)."""

@final
class Native:
    """An instruction of which the SDM leaves something open, as this computer executes it.

    So the machine does, for generated code runs such instructions as themselves.
    """

    def __new__(cls, name: str, size: int) -> Native:
        """Its mnemonic, and the bytes of its operands.

        "rol by", "ror by": of a register, by a number in the instruction; "imul wide": of one
        operand.  ValueError: nothing is open, or it has no such form.
        """

    def __call__(self, a: int, b: int, c: int, before: int) -> tuple[int, int]:
        """What is in RAX afterwards, and the status flags.

        a: the first operand; of a division the low half of the dividend.  b: the second one; the
        filler of a double shift, the high half of a dividend, the source of a scan, a count or a
        field.  c: the count of a shift, the factor of MUL, the divisor, what BEXTR and BZHI take
        their place from, the second source of ANDN.  before: the flags.  All are masked by the
        caller.  ValueError: a division that faults, or this computer has no such instruction.
        """
