//! What a processor is: every register, the caches that software can observe, and counters.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::apic::LocalApic;
use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::segment::{Segment, TableRegister, attr, seg};
use crate::bus::Agent;
use crate::code::NOBODY;
use crate::cpu::countdown::Countdown;
use crate::cpu::decode::Decoded;
use crate::cpu::event::Event;
use crate::cpu::pmu::Pmu;
use crate::cpu::pointers::Pointers;
use crate::cpu::random::Random;
use crate::cpu::ring0::Ring0;
use crate::cpu::upper::Upper;
use crate::cpu::vector::Vectors;
use crate::dbt::home::Bell;
use crate::dbt::record::Record;
use crate::dbt::tables::Tables;
use crate::dbt::zeroed::{Vacant, Zeroed, build};
use crate::mem::Memory;
use crate::mmu::tlb::{self, Tlb};
use crate::vmx::Vmx;

/// The x87/SSE state in FXSAVE64 format.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fx(pub [u8; 512]);

impl Fx {
    /// After reset / FNINIT with MXCSR at its default.
    #[must_use]
    pub const fn at_reset() -> Self {
        let mut image = [0; 512];
        [image[0], image[1]] = 0x037F_u16.to_le_bytes(); // FCW
        [image[24], image[25], ..] = 0x1F80_u32.to_le_bytes(); // MXCSR
        [image[28], image[29], ..] = 0xFFFF_u32.to_le_bytes(); // MXCSR_MASK
        Self(image)
    }
}

/// Why interrupts wait for one more instruction (SDM 3C, "Guest Non-Register State").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Shadow {
    /// They do not.
    #[default]
    None,
    /// After STI.
    Sti,
    /// After MOV SS or POP SS.
    MovSs,
}

/// Activity state (SDM 3C, "Guest Non-Register State").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Activity {
    /// Executing.
    #[default]
    Active,
    /// After HLT.
    Hlt,
    /// After a triple fault.
    Shutdown,
    /// Waiting for a start-up IPI.
    WaitForSipi,
}

/// What sort of code CS and the control registers select.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Mode {
    /// Real-address mode.
    #[default]
    Real,
    /// Virtual-8086 mode.
    V86,
    /// Protected or compatibility mode, 16-bit code.
    Bits16,
    /// Protected or compatibility mode, 32-bit code.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

/// Model-specific registers that are plain storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub spec_ctrl: u64,
    pub feature_control: u64,
    pub mtrr_def_type: u64,
    pub xss: u64,
    pub pkrs: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            debugctl: 0,
            spec_ctrl: 0,
            feature_control: 5, // locked, VMX outside SMX
            mtrr_def_type: 0xC06,
            xss: 0,
            pkrs: 0,
        }
    }
}

/// What is counted, always.  Equal for every engine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Data translations that needed a walk.
    pub tlb_misses: u64,
    /// Instruction-fetch translations that needed a walk.
    pub itlb_misses: u64,
    /// Page-walk references of the guest dimension by level number.
    pub walk_guest: [u64; 6],
    /// Page-walk references of the host dimension (EPT) by level number.
    pub walk_host: [u64; 6],
    /// Walks that a paging-structure cache shortened, by the level of the entry found there.
    pub structure_hits: [u64; 6],
    /// Walks that paging-structure caches, being on, could not shorten.
    pub structure_misses: u64,
    /// Guest-physical addresses that the nested TLB knew.
    pub nested_hits: u64,
    /// Guest-physical addresses that the nested TLB, being on, did not know.
    pub nested_misses: u64,
    /// VM entries.
    pub entries: u64,
    /// VM exits by basic reason.
    pub exits: [u64; 80],
    /// Events delivered through the IDT by vector.
    pub injected: Vec<u64>,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            tlb_misses: 0,
            itlb_misses: 0,
            walk_guest: [0; 6],
            walk_host: [0; 6],
            structure_hits: [0; 6],
            structure_misses: 0,
            nested_hits: 0,
            nested_misses: 0,
            entries: 0,
            exits: [0; 80],
            injected: vec![0; 256],
        }
    }
}

/// How the TSC gets on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clock {
    /// One tick per retired instruction, plus idle time added by `advance`.
    Virtual,
    /// Nanoseconds of the computer's monotonic clock.
    Wall,
}

/// The whole processor.  The engine addresses the first fields by their offsets.
#[repr(C, align(64))]
pub struct Core {
    /// Instructions until the dispatcher must look again; see [`Core::retired`].
    pub countdown: Countdown,
    /// The arithmetic flags between blocks of generated code.  (With the countdown it is in one cache line: every
    /// block stores both.)
    pub record: Record,
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
    pub gpr: [u64; 16],
    /// The address of the next instruction.
    pub rip: u64,
    /// RFLAGS, bit 1 always set.
    pub rflags: u64,
    /// Set when something happened that the dispatcher must look at before the next instruction.
    pub attention: u64,
    /// What generated code shares with the engine.
    pub jit: Tables,
    /// ES CS SS DS FS GS.
    pub seg: [Segment; 6],
    /// x87 and SSE state (when the engine does not hold it in the computer's own registers).
    pub fx: Fx,
    /// What YMM registers have beyond that (likewise).
    pub upper: Upper,
    /// The last x87 instruction (when generated code has not yet told of a later one).
    pub pointers: Pointers,
    /// The translation cache, with the engine's first level.
    pub tlb: Tlb,

    /// Current privilege level.
    pub cpl: u8,
    /// Derived: what sort of code runs.  [`Core::refresh`] keeps it.
    pub mode: Mode,
    /// Control registers.
    pub cr0: u64,
    /// The last page-fault address.
    pub cr2: u64,
    /// The paging root.
    pub cr3: u64,
    /// Extensions.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// DR0 … DR7 (4 and 5 unused).
    pub dr: [u64; 8],
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// The PAE page-directory-pointer-table entries, loaded with CR3.
    pub pdpte: [u64; 4],
    /// MSRs that are plain storage.
    pub msr: Msrs,
    /// Performance monitoring.
    pub pmu: Pmu,
    /// The state components that XSAVE and its kin may save.
    pub xcr0: u64,
    /// Protection-key rights for user pages.
    pub pkru: u32,
    /// Where RDRAND and RDSEED get their numbers.
    pub random: Random,
    /// Interrupt shadow.
    pub shadow: Shadow,
    /// The one that the instruction which executes is in.
    pub shadowed: Shadow,
    /// Blocking by NMI.
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// Executing, halted, …
    pub activity: Activity,
    /// #DB conditions met by the instruction that is executing (DR6 bits), for its end.
    pub pending_db: u64,
    /// The event being delivered, for IDT-vectoring information and double faults.
    pub vectoring: Option<Event>,
    /// RF is to be set in its frame, whatever it is in RFLAGS: for the exit that comes in between.
    pub vectoring_resumes: bool,
    /// An IRET has just faulted and ended the blocking of NMIs: for the exit that comes of it.
    pub nmi_unblocked_by_fault: bool,

    /// Nothing is due when `countdown` reaches 0: the engine may return a little before.
    pub may_stop_early: bool,
    /// [`Core::retired`] when `countdown` reaches 0.
    pub horizon: u64,
    /// Idle time that passed on the virtual clock (ticks); on the wall clock: the origin.
    pub tsc_skew: u64,
    /// Which clock.
    pub clock: Clock,

    /// Physical memory.
    pub mem: Arc<Memory>,
    /// Counters.
    pub counts: Counts,
    /// VMX operation.
    pub vmx: Vmx,
    /// The local APIC.
    pub apic: LocalApic,
    /// What CPUID shows outside VMX: (leaf, subleaf) -> EAX EBX ECX EDX.
    pub cpuid: BTreeMap<(u32, u32), [u32; 4]>,
    /// Writes that hit frames marked as code: (hpa, bytes).  Engines drain it.
    pub code_writes: Vec<(u64, u64)>,
    /// Instructions decoded before.
    pub decoded: Decoded,
    /// x87 and SSE instructions copied before.
    pub vectors: Vectors,
    /// Who is at CPL 0.
    pub ring0: Ring0,
    /// The processor on the bus.
    pub agent: Arc<Agent>,
    /// The changes on the bus that were looked at.
    pub caught_up: u64,
    /// The marks of code that were.
    pub marks: u64,
    /// [`Memory::dirty_epoch`] since which generated code's writable pages are marked dirty.
    pub dirty_epoch: u64,
    /// Others may run at the same time.
    pub is_parallel: bool,
    /// Its engine's number among those that hold translations.
    pub holder: u32,
}

impl Core {
    /// A processor after power-up reset (SDM 3A, "Processor Management and Initialization").
    ///
    /// # Errors
    /// If the computer has no room for its tables.
    pub fn build(
        place: Vacant<'_, Core>,
        mem: Arc<Memory>,
        clock: Clock,
        apic_id: u32,
        bell: Bell,
    ) -> io::Result<&mut Core> {
        let agent = mem.bus().join(bell);
        let (caught_up, marks) = (agent.bus().changes(), agent.bus().marks());
        let dirty_epoch = mem.dirty_epoch();
        let is_parallel = agent.bus().is_parallel();
        let entries = Zeroed::new(tlb::ENTRIES)?;
        let data = Segment { base: 0, limit: 0xFFFF, attr: 0x93, selector: 0 };
        let mut segs = [data; 6];
        segs[seg::CS] = Segment { base: 0xFFFF_0000, limit: 0xFFFF, attr: 0x9B, selector: 0xF000 };
        let core = build!(place, Core {
            countdown: Countdown::new(0),
            record: Record::default(),
            gpr: [0; 16],
            rip: 0xFFF0,
            rflags: rflags::FIXED1,
            may_stop_early: false,
            attention: 0,
            seg: segs,
            fx: Fx::at_reset(),
            upper: Upper::default(),
            pointers: Pointers::default(),
            cpl: 0,
            mode: Mode::Real,
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400],
            gdtr: TableRegister { base: 0, limit: 0xFFFF },
            idtr: TableRegister { base: 0, limit: 0xFFFF },
            ldtr: Segment { base: 0, limit: 0xFFFF, attr: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xFFFF, attr: 0x8B, selector: 0 },
            pdpte: [0; 4],
            msr: Msrs::default(),
            pmu: Pmu::default(),
            xcr0: 1,
            pkru: 0,
            random: Random::of_processor(apic_id),
            shadow: Shadow::None,
            shadowed: Shadow::None,
            nmi_blocked: false,
            nmi_pending: false,
            activity: Activity::Active,
            pending_db: 0,
            vectoring: None,
            vectoring_resumes: false,
            nmi_unblocked_by_fault: false,
            horizon: 0,
            tsc_skew: 0,
            clock: clock,
            mem: mem,
            counts: Counts::default(),
            vmx: Vmx::default(),
            apic: LocalApic::new(apic_id, apic_id == 0),
            cpuid: BTreeMap::new(),
            code_writes: Vec::new(),
            decoded: Decoded::default(),
            vectors: Vectors::default(),
            ring0: Ring0::default(),
            agent: agent,
            caught_up: caught_up,
            marks: marks,
            dirty_epoch: dirty_epoch,
            is_parallel: is_parallel,
            holder: NOBODY,
            ; in place
            jit: Tables::build,
            tlb: |place| Tlb::build(place, entries),
            ; zeros
        });
        core.refresh();
        Ok(core)
    }

    /// Instructions retired since reset.
    #[inline]
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.horizon.wrapping_sub(self.countdown.get().cast_unsigned())
    }

    /// Let the engine retire `n` more instructions before the dispatcher looks again.
    pub fn set_countdown(&mut self, n: i64) {
        let retired = self.retired();
        self.countdown.set(n);
        self.horizon = retired.wrapping_add(n.cast_unsigned());
    }

    /// The time-stamp counter, without any VMCS offset.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        match self.clock {
            Clock::Virtual => self.retired().wrapping_add(self.tsc_skew),
            Clock::Wall => monotonic_ns().wrapping_add(self.tsc_skew),
        }
    }

    /// Whether CR0.PE is set.
    #[inline]
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether IA32_EFER.LMA is set.
    #[inline]
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether 64-bit code runs.
    #[inline]
    #[must_use]
    pub fn is_64(&self) -> bool {
        self.mode == Mode::Bits64
    }

    /// Whether paging is on.
    #[inline]
    #[must_use]
    pub fn is_paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// RFLAGS bit(s) set?
    #[inline]
    #[must_use]
    pub fn flag(&self, bits: u64) -> bool {
        self.rflags & bits != 0
    }

    /// Recompute what is derived from CR0, CR3, CR4, EFER, CS, RFLAGS.VM and the VMCS.
    ///
    /// Whoever changes one of these calls this before the next instruction.
    pub fn refresh(&mut self) {
        let cs = &self.seg[seg::CS];
        self.mode = if !self.is_protected() {
            Mode::Real
        } else if self.flag(rflags::VM) {
            Mode::V86
        } else if self.is_long() && cs.has(attr::L) {
            Mode::Bits64
        } else if cs.has(attr::DB) {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        self.refresh_space();
    }

    /// Whether the stack pointer is 64, 32 or 16 bits wide: its mask.
    #[must_use]
    pub fn stack_mask(&self) -> u64 {
        match self.mode {
            Mode::Bits64 => u64::MAX,
            _ if self.seg[seg::SS].has(attr::DB) => 0xFFFF_FFFF,
            _ => 0xFFFF,
        }
    }

    /// Whether supervisor data accesses to user pages fault now (SMAP in force and not lifted).
    #[must_use]
    pub fn is_smap_armed(&self) -> bool {
        self.cr4 & cr4::SMAP != 0 && !self.flag(rflags::AC)
    }
}

/// The computer's monotonic clock in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    ORIGIN.get_or_init(Instant::now).elapsed().as_nanos() as u64
}
