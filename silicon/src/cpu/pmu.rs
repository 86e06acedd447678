//! Architectural performance monitoring, version 2 (SDM 3B, "Performance Monitoring").
//!
//! Counters are not moved by instructions: what they have counted follows from what the processor
//! counts anyway, [`Core::retired`] and the clock, and is added up by [`settle`] whenever the
//! privilege level, a register or the time changes what is counted.  So counting costs nothing
//! while code runs, and is exact under every engine.
//!
//! Events: instructions retired; core and reference cycles.  On the virtual clock an instruction
//! takes one cycle, and time that no instruction takes (HLT, what stands outside the machine) has no
//! cycles; on the wall clock a cycle is a nanosecond of running.  An instruction that changes the
//! privilege level counts at the new one.
//!
//! Invariants: between two runs of the processor nothing is counted; an overflow that raises an
//! interrupt is met at the end of the instruction that made it, for events that instructions
//! decide.

use crate::cpu::state::{Clock, Core, monotonic_ns};

/// General counters.
pub const GENERAL: usize = 4;
/// Fixed counters: instructions retired, core cycles, reference cycles.
pub const FIXED: usize = 3;
/// Bits of a counter.
pub const WIDTH: u32 = 48;
const COUNTER: u64 = (1 << WIDTH) - 1;
/// IA32_PERF_GLOBAL_CTRL, and the overflow bits of IA32_PERF_GLOBAL_STATUS.
pub const GLOBAL: u64 = ((1 << FIXED) - 1) << 32 | ((1 << GENERAL) - 1);
/// OvfBuf and CondChgd, which nothing sets here.
const CLEARED: u64 = 3 << 62;
/// IA32_PERF_CAPABILITIES: FW_WRITE, general counters can be written as a whole.
const CAPABILITIES: u64 = 1 << 13;
/// IA32_FIXED_CTR_CTRL: for each counter OS, USR and PMI (AnyThread comes with version 3).
const FIXED_CTRL: u64 = 0xBBB;
/// IA32_DEBUGCTL: FREEZE_LBRS_ON_PMI, FREEZE_PERFMON_ON_PMI.
pub(crate) const FREEZE_BITS: u64 = 3 << 11;
const FREEZE_PERFMON_ON_PMI: u64 = 1 << 12;

/// IA32_PERFEVTSELx.
mod select {
    pub const USR: u64 = 1 << 16;
    pub const OS: u64 = 1 << 17;
    pub const INT: u64 = 1 << 20;
    pub const EN: u64 = 1 << 22;
    /// CMASK, INV, EDGE.
    pub const COMPARISON: u64 = 0xFF << 24 | 1 << 23 | 1 << 18;
    /// AnyThread comes with version 3.
    pub const RESERVED: u64 = !0xFFFF_FFFF | 1 << 21;
}

/// The registers' numbers.
mod at {
    pub const PMC: u32 = 0xC1;
    pub const PERFEVTSEL: u32 = 0x186;
    pub const FIXED_CTR: u32 = 0x309;
    pub const CAPABILITIES: u32 = 0x345;
    pub const FIXED_CTR_CTRL: u32 = 0x38D;
    pub const GLOBAL_STATUS: u32 = 0x38E;
    pub const GLOBAL_CTRL: u32 = 0x38F;
    pub const GLOBAL_OVF_CTRL: u32 = 0x390;
    pub const A_PMC: u32 = 0x4C1;
}

/// The registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pmu {
    general: [u64; GENERAL],
    select: [u64; GENERAL],
    fixed: [u64; FIXED],
    fixed_ctrl: u64,
    global_ctrl: u64,
    status: u64,
    /// Up to where the counters have counted: instructions retired, cycles.
    mark: (u64, u64),
    /// Whether the processor runs.
    is_running: bool,
    /// Some counter counts at some level.
    pub(crate) counts: bool,
    /// Some counter that counts raises an interrupt.
    is_armed: bool,
    /// The next overflow may be nearer than the dispatcher knows.
    pub(crate) is_news: bool,
}

impl Default for Pmu {
    fn default() -> Self {
        Self {
            general: [0; GENERAL],
            select: [0; GENERAL],
            fixed: [0; FIXED],
            fixed_ctrl: 0,
            global_ctrl: (1 << GENERAL) - 1,
            status: 0,
            mark: (0, 0),
            is_running: false,
            counts: false,
            is_armed: false,
            is_news: false,
        }
    }
}

/// What a counter counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Instructions,
    Cycles,
}

/// One counter that is enabled.
#[derive(Clone, Copy)]
struct Enabled {
    /// Its bit in the global registers.
    bit: u32,
    what: What,
    /// At levels 1 to 3, at level 0.
    levels: (bool, bool),
    interrupts: bool,
}

impl Pmu {
    fn enabled(&self) -> impl Iterator<Item = Enabled> + use<> {
        let this = *self;
        let on = move |bit: u32| this.global_ctrl >> bit & 1 != 0;
        let general = (0..GENERAL).filter_map(move |i| {
            let s = this.select[i];
            let levels = (s & select::USR != 0, s & select::OS != 0);
            let is_on = on(i as u32) && s & select::EN != 0;
            let what = event(s).filter(|_| is_on)?;
            Some(Enabled { bit: i as u32, what, levels, interrupts: s & select::INT != 0 })
        });
        let fixed = (0..FIXED).filter_map(move |i| {
            let c = this.fixed_ctrl >> (4 * i);
            let (bit, levels) = (32 + i as u32, (c & 2 != 0, c & 1 != 0));
            let what = if i == 0 { What::Instructions } else { What::Cycles };
            on(bit).then_some(Enabled { bit, what, levels, interrupts: c & 8 != 0 })
        });
        general.chain(fixed).filter(|e| e.levels != (false, false))
    }

    fn counter(&mut self, bit: u32) -> &mut u64 {
        let i = bit as usize;
        if i < GENERAL { &mut self.general[i] } else { &mut self.fixed[i - 32] }
    }

    /// What derives from the registers.
    fn note(&mut self) {
        self.counts = self.enabled().next().is_some();
        self.is_armed = self.enabled().any(|e| e.interrupts);
        self.is_news = true;
    }

    /// All of it as numbers, for saving.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        let mut words = vec![self.fixed_ctrl, self.global_ctrl, self.status];
        words.extend(self.general);
        words.extend(self.select);
        words.extend(self.fixed);
        words
    }

    /// The reverse of [`Pmu::to_words`]; `None` if they are no state that can be.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let words = <&[u64; 3 + 2 * GENERAL + FIXED]>::try_from(words).ok()?;
        let [fixed_ctrl, global_ctrl, status, rest @ ..] = words;
        let (general, rest) = rest.split_first_chunk::<GENERAL>()?;
        let (select, rest) = rest.split_first_chunk::<GENERAL>()?;
        let fixed = <[u64; FIXED]>::try_from(rest).ok()?;
        let fits = general.iter().chain(&fixed).all(|c| c & !COUNTER == 0)
            && select.iter().all(|s| s & select::RESERVED == 0)
            && fixed_ctrl & !FIXED_CTRL == 0
            && (global_ctrl | status) & !GLOBAL == 0;
        let mut pmu = Self {
            general: *general,
            select: *select,
            fixed,
            fixed_ctrl: *fixed_ctrl,
            global_ctrl: *global_ctrl,
            status: *status,
            ..Self::default()
        };
        pmu.note();
        fits.then_some(pmu)
    }
}

/// The event that a selection counts; `None` if it counts nothing, as with every comparison (counter
/// mask, inverted, edges), which would look at what happens in one cycle.
fn event(s: u64) -> Option<What> {
    match (s as u16, s & select::COMPARISON) {
        (0x003C | 0x013C, 0) => Some(What::Cycles),
        (0x00C0, 0) => Some(What::Instructions),
        _ => None,
    }
}

fn cycles(core: &Core) -> u64 {
    match core.clock {
        Clock::Virtual => core.retired(),
        Clock::Wall => monotonic_ns(),
    }
}

/// Add what was counted since the last time, at this privilege level; overflows take effect.
pub(crate) fn settle(core: &mut Core) {
    if !core.pmu.counts || !core.pmu.is_running {
        return;
    }
    let now = (core.retired(), cycles(core));
    let (instructions, cycles) = (now.0.wrapping_sub(core.pmu.mark.0), now.1.wrapping_sub(core.pmu.mark.1));
    core.pmu.mark = now;
    let mut interrupts = false;
    let enabled = core.pmu.enabled();
    for e in enabled.filter(|e| counts_at(*e, core.cpl)) {
        let counter = core.pmu.counter(e.bit);
        let sum = *counter + if e.what == What::Instructions { instructions } else { cycles };
        *counter = sum & COUNTER;
        if sum > COUNTER {
            core.pmu.status |= 1 << e.bit;
            interrupts |= e.interrupts;
        }
    }
    if interrupts {
        interrupt(core);
    }
}

fn counts_at(e: Enabled, cpl: u8) -> bool {
    if cpl == 0 { e.levels.1 } else { e.levels.0 }
}

/// A performance-monitoring interrupt ("Freezing on PMI": version 2 clears the global enables).
fn interrupt(core: &mut Core) {
    if core.msr.debugctl & FREEZE_PERFMON_ON_PMI != 0 {
        core.pmu.global_ctrl = 0;
    }
    core.pmu.note();
    core.apic.performance_interrupt();
    core.nmi_pending |= core.apic.take_nmi();
    core.attention = 1;
}

/// The processor runs from now on, or no longer.
pub(crate) fn set_running(core: &mut Core, is_running: bool) {
    settle(core);
    core.pmu.is_running = is_running;
    skip_idle(core);
}

/// Time passed in which nothing ran.
pub(crate) fn skip_idle(core: &mut Core) {
    if core.pmu.counts {
        mark(core);
    }
}

/// What was counted up to now is no longer asked for.
fn mark(core: &mut Core) {
    core.pmu.mark = (core.retired(), cycles(core));
}

/// Let counters that interrupt come up to now; how many instructions may retire at this privilege
/// level until one of them overflows.
pub(crate) fn distance(core: &mut Core) -> u64 {
    core.pmu.is_news = false;
    if !core.pmu.is_armed {
        return u64::MAX;
    }
    settle(core);
    core.pmu.is_news = false;
    let decided = |what| what == What::Instructions || core.clock == Clock::Virtual;
    let next = core.pmu.enabled().filter(|e| e.interrupts && decided(e.what) && counts_at(*e, core.cpl));
    let mut pmu = core.pmu;
    next.map(|e| COUNTER + 1 - *pmu.counter(e.bit)).min().unwrap_or(u64::MAX)
}

/// The current privilege level becomes this one.
#[inline]
pub(crate) fn set_level(core: &mut Core, cpl: u8) {
    if core.pmu.counts && core.cpl != cpl {
        settle(core);
        if core.pmu.is_armed {
            core.pmu.is_news = true;
            core.attention = 1;
        }
    }
    core.cpl = cpl;
}

/// RDPMC: the counter that ECX names; `None` if there is none.
pub(crate) fn read_counter(core: &mut Core, ecx: u32) -> Option<u64> {
    const FIXED_COUNTER: u32 = 1 << 30;
    settle(core);
    let i = (ecx & !FIXED_COUNTER) as usize;
    if ecx & FIXED_COUNTER == 0 { core.pmu.general.get(i) } else { core.pmu.fixed.get(i) }.copied()
}

fn place(msr: u32, first: u32, count: usize) -> Option<usize> {
    let i = msr.wrapping_sub(first) as usize;
    (i < count).then_some(i)
}

/// RDMSR; `None` if it is none of these registers.
pub(crate) fn read(core: &mut Core, msr: u32) -> Option<u64> {
    settle(core);
    let p = &core.pmu;
    if let Some(i) = place(msr, at::PMC, GENERAL).or_else(|| place(msr, at::A_PMC, GENERAL)) {
        return Some(p.general[i]);
    }
    if let Some(i) = place(msr, at::PERFEVTSEL, GENERAL) {
        return Some(p.select[i]);
    }
    if let Some(i) = place(msr, at::FIXED_CTR, FIXED) {
        return Some(p.fixed[i]);
    }
    Some(match msr {
        at::CAPABILITIES => CAPABILITIES,
        at::FIXED_CTR_CTRL => p.fixed_ctrl,
        at::GLOBAL_STATUS => p.status,
        at::GLOBAL_CTRL => p.global_ctrl,
        at::GLOBAL_OVF_CTRL => 0,
        _ => return None,
    })
}

/// WRMSR; `None` if it is none of these registers, or does not take the value.
pub(crate) fn write(core: &mut Core, msr: u32, value: u64) -> Option<()> {
    settle(core);
    mark(core);
    let p = &mut core.pmu;
    let is = |mask: u64| (value & !mask == 0).then_some(());
    if let Some(i) = place(msr, at::PMC, GENERAL) {
        // "IA32_PMCx": bits 31:0 are written, and sign-extended.
        p.general[i] = i64::from(value as i32).cast_unsigned() & COUNTER;
    } else if let Some(i) = place(msr, at::A_PMC, GENERAL) {
        is(COUNTER)?;
        p.general[i] = value;
    } else if let Some(i) = place(msr, at::PERFEVTSEL, GENERAL) {
        is(!select::RESERVED)?;
        p.select[i] = value;
    } else if let Some(i) = place(msr, at::FIXED_CTR, FIXED) {
        is(COUNTER)?;
        p.fixed[i] = value;
    } else {
        match msr {
            at::FIXED_CTR_CTRL => {
                is(FIXED_CTRL)?;
                p.fixed_ctrl = value;
            }
            at::GLOBAL_CTRL => {
                is(GLOBAL)?;
                p.global_ctrl = value;
            }
            at::GLOBAL_OVF_CTRL => {
                is(GLOBAL | CLEARED)?;
                p.status &= !value;
            }
            _ => return None,
        }
    }
    p.note();
    core.attention = 1;
    Some(())
}

/// "load IA32_PERF_GLOBAL_CTRL" of VM entries and exits.
pub(crate) fn load_global(core: &mut Core, value: u64) {
    settle(core);
    if core.pmu.global_ctrl != value & GLOBAL {
        core.pmu.global_ctrl = value & GLOBAL;
        core.pmu.note();
    }
    skip_idle(core);
}
