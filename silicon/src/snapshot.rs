//! A processor as bytes, and as one number.
//!
//! One function, [`visit`], lists what a processor is; saving, loading and hashing all walk it, so
//! that none can forget what another knows.  What of a guest is not in its VMCS when it has exited
//! is a part of that list, [`visit_live`], which can be had alone.
//!
//! What the TLB and the walker's caches hold is not among it.  Saving empties them in the processor that is saved, too: it and a
//! processor that loads the bytes go on alike, to the last walk and accessed flag.

use std::fmt;

use crate::apic::LocalApic;
use crate::arch::bits::{cr4, efer};
use crate::arch::segment::{Segment, TableRegister};
use crate::cpu::event::{Event, Kind};
use crate::cpu::fxstate::{MXCSR_MASK, normalize};
use crate::cpu::pmu::Pmu;
use crate::cpu::pointers::Pointers;
use crate::cpu::state::{Activity, Clock, Core, Shadow};
use crate::cpu::xsave;
use crate::vmx::Vmx;

/// "understudy processor", and the version of what follows.
const MAGIC: u64 = u64::from_le_bytes(*b"USPROC\x00\x09");
/// Most CPUID leaves, APIC or VMX words that bytes may announce.
const MOST: usize = 4096;

/// Why bytes are no processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A 64-bit hash, one multiplication a word: for comparing machines, not for secrets.
#[derive(Clone, Debug)]
pub struct Hasher {
    state: u64,
    words: u64,
}

impl Default for Hasher {
    fn default() -> Self {
        Self { state: 0x9E37_79B9_7F4A_7C15, words: 0 }
    }
}

impl Hasher {
    /// Take in a word.
    pub fn word(&mut self, word: u64) {
        let x = (self.state ^ word).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        self.state = x ^ x >> 32;
        self.words += 1;
    }

    /// Take in bytes; a last piece of less than eight counts as padded with zeros.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for w in words {
            self.word(u64::from_le_bytes(*w));
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.word(u64::from_le_bytes(last));
        }
    }

    /// The hash of all that was taken in.
    #[must_use]
    pub fn finish(&self) -> u64 {
        let x = (self.state ^ self.words).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        x ^ x >> 33
    }
}

/// What walks over a processor: writes its words out, or reads them in.
enum Walk<'a> {
    Out(&'a mut Vec<u64>),
    In { words: &'a [u64], problem: Option<String> },
}

impl Walk<'_> {
    fn fail(&mut self, what: &str) {
        if let Walk::In { problem, .. } = self {
            problem.get_or_insert_with(|| format!("saved processor: {what}"));
        }
    }

    fn word(&mut self, w: &mut u64) {
        match self {
            Walk::Out(out) => out.push(*w),
            Walk::In { words, .. } => match words.split_first() {
                Some((first, rest)) => (*w, *words) = (*first, rest),
                None => self.fail("ends too early; expected more words"),
            },
        }
    }

    fn words(&mut self, all: &mut [u64]) {
        for w in all {
            self.word(w);
        }
    }

    /// Bytes that make whole words.
    fn bytes(&mut self, all: &mut [u8]) {
        for eight in all.as_chunks_mut::<8>().0 {
            let mut word = u64::from_le_bytes(*eight);
            self.word(&mut word);
            *eight = word.to_le_bytes();
        }
    }

    /// A number of fewer bits.
    fn number<T: Copy + Into<u64> + TryFrom<u64>>(&mut self, n: &mut T, name: &str) {
        let mut w = (*n).into();
        self.word(&mut w);
        match T::try_from(w) {
            Ok(v) => *n = v,
            Err(_) => self.fail(&format!("{name} is {w:#x}, more than {} bits hold", 8 * size_of::<T>())),
        }
    }

    /// One of a few values, written as its place among them.
    fn choice<T: Copy + PartialEq>(&mut self, value: &mut T, among: &[T], name: &str) {
        let mut w = among.iter().position(|v| v == value).unwrap_or(0) as u64;
        self.word(&mut w);
        match among.get(usize::try_from(w).unwrap_or(usize::MAX)) {
            Some(v) => *value = *v,
            None => self.fail(&format!("{name} is number {w}; expected below {}", among.len())),
        }
    }

    fn flag(&mut self, b: &mut bool, name: &str) {
        self.choice(b, &[false, true], name);
    }

    /// How many words follow.
    fn length(&mut self, now: usize, name: &str) -> usize {
        let mut n = now as u64;
        self.word(&mut n);
        if n > MOST as u64 {
            self.fail(&format!("{n} {name}; expected at most {MOST}"));
            return 0;
        }
        n as usize
    }

    fn segment(&mut self, s: &mut Segment, name: &str) {
        self.word(&mut s.base);
        self.number(&mut s.limit, name);
        self.number(&mut s.attr, name);
        self.number(&mut s.selector, name);
    }

    fn table(&mut self, t: &mut TableRegister, name: &str) {
        self.word(&mut t.base);
        self.number(&mut t.limit, name);
    }

    /// A part that makes words of itself.
    fn part<T>(&mut self, p: &mut T, to: fn(&T) -> Vec<u64>, from: fn(&[u64]) -> Option<T>, name: &str) {
        let mut all = to(p);
        let n = self.length(all.len(), name);
        all.resize(n, 0);
        self.words(&mut all);
        match from(&all) {
            Some(v) => *p = v,
            None => self.fail(&format!("the {n} {name} describe no state that can be")),
        }
    }
}

fn visit_pointers(p: &mut Pointers, w: &mut Walk<'_>) {
    w.word(&mut p.fip);
    w.word(&mut p.fdp);
    w.number(&mut p.fop, "FOP");
    w.number(&mut p.fcs, "FCS");
    w.number(&mut p.fds, "FDS");
    p.fop &= 0x7FF;
}

/// What VM exits leave of a guest in the processor, and VM entries of the next one find there: SDM
/// 3C, "Saving Guest State" and "Loading Guest State", do not name it.
fn visit_live(core: &mut Core, w: &mut Walk<'_>) {
    w.words(&mut core.gpr);
    w.word(&mut core.cr2);
    w.words(&mut core.dr[..4]);
    w.word(&mut core.dr[6]);
    let m = &mut core.msr;
    for msr in [
        &mut m.star,
        &mut m.lstar,
        &mut m.cstar,
        &mut m.fmask,
        &mut m.kernel_gs_base,
        &mut m.tsc_aux,
        &mut m.xss,
        &mut m.pkrs,
    ] {
        w.word(msr);
    }
    w.word(&mut core.xcr0);
    if !xsave::is_xcr0(core.xcr0) || core.msr.xss != 0 || core.msr.pkrs >> 32 != 0 {
        w.fail("XCR0, IA32_XSS or IA32_PKRS has bits that this processor does not have");
    }
    w.number(&mut core.pkru, "PKRU");
    w.words(&mut core.random.key);
    w.word(&mut core.random.drawn);
    w.bytes(&mut core.fx.0);
    core.upper.change(|halves| w.bytes(halves.as_flattened_mut()));
    visit_pointers(&mut core.pointers, w);
    if core.fx.mxcsr() & !MXCSR_MASK != 0 {
        w.fail("MXCSR has reserved bits set");
    }
    w.part(&mut core.pmu, Pmu::to_words, Pmu::from_words, "words of performance monitoring");
}

/// All of a processor but its TLB, its clock and what derives from the rest.
fn visit(core: &mut Core, w: &mut Walk<'_>) {
    visit_live(core, w);
    w.word(&mut core.rip);
    w.word(&mut core.rflags);
    for s in &mut core.seg {
        w.segment(s, "a segment register");
    }
    w.segment(&mut core.ldtr, "LDTR");
    w.segment(&mut core.tr, "TR");
    w.table(&mut core.gdtr, "GDTR");
    w.table(&mut core.idtr, "IDTR");
    w.choice(&mut core.cpl, &[0, 1, 2, 3], "the privilege level");
    for cr in [&mut core.cr0, &mut core.cr3, &mut core.cr4, &mut core.efer] {
        w.word(cr);
    }
    if core.cr4 & !cr4::KNOWN != 0 || core.efer & !efer::KNOWN != 0 {
        w.fail("CR4 or IA32_EFER has bits that this processor does not have");
    }
    w.words(&mut core.dr[4..6]);
    w.word(&mut core.dr[7]);
    w.words(&mut core.pdpte);
    let m = &mut core.msr;
    for msr in [
        &mut m.sysenter_cs,
        &mut m.sysenter_esp,
        &mut m.sysenter_eip,
        &mut m.tsc_adjust,
        &mut m.pat,
        &mut m.misc_enable,
        &mut m.debugctl,
        &mut m.spec_ctrl,
        &mut m.feature_control,
        &mut m.mtrr_def_type,
    ] {
        w.word(msr);
    }
    w.choice(&mut core.shadow, &[Shadow::None, Shadow::Sti, Shadow::MovSs], "the interrupt shadow");
    w.flag(&mut core.nmi_blocked, "blocking by NMI");
    w.flag(&mut core.nmi_pending, "a pending NMI");
    let activities = [Activity::Active, Activity::Hlt, Activity::Shutdown, Activity::WaitForSipi];
    w.choice(&mut core.activity, &activities, "the activity state");
    w.word(&mut core.pending_db);
    visit_vectoring(&mut core.vectoring, w);
    w.part(&mut core.vmx, Vmx::to_words, Vmx::from_words, "words of VMX state");
    w.part(&mut core.apic, LocalApic::to_words, LocalApic::from_words, "words of APIC state");
    visit_counts(core, w);
    let (mut structures, mut nested) = core.tlb.caches.sizes();
    w.word(&mut structures);
    w.word(&mut nested);
    core.tlb.caches.resize(structures, nested);
    visit_cpuid(core, w);
}

fn visit_vectoring(vectoring: &mut Option<Event>, w: &mut Walk<'_>) {
    const KINDS: [Kind; 6] = [
        Kind::External,
        Kind::Nmi,
        Kind::Hardware,
        Kind::Software,
        Kind::PrivilegedSoftware,
        Kind::SoftwareException,
    ];
    let none = Event { vector: 0, kind: Kind::External, error: None, length: 0 };
    let (mut is_some, mut e) = (vectoring.is_some(), vectoring.unwrap_or(none));
    let (mut has_error, mut error) = (e.error.is_some(), e.error.unwrap_or(0));
    w.flag(&mut is_some, "an event on its way");
    w.number(&mut e.vector, "a vector");
    w.choice(&mut e.kind, &KINDS, "an event's kind");
    w.flag(&mut has_error, "an event's error code");
    w.number(&mut error, "an error code");
    w.number(&mut e.length, "an instruction length");
    e.error = has_error.then_some(error);
    *vectoring = is_some.then_some(e);
}

fn visit_counts(core: &mut Core, w: &mut Walk<'_>) {
    let c = &mut core.counts;
    w.word(&mut c.tlb_misses);
    w.word(&mut c.itlb_misses);
    w.words(&mut c.walk_guest);
    w.words(&mut c.walk_host);
    w.words(&mut c.structure_hits);
    w.word(&mut c.structure_misses);
    w.word(&mut c.nested_hits);
    w.word(&mut c.nested_misses);
    w.word(&mut c.entries);
    w.words(&mut c.exits);
    w.words(&mut c.injected);
    let mut retired = core.retired();
    w.word(&mut retired);
    core.horizon = retired;
    core.countdown.set(0);
}

fn visit_cpuid(core: &mut Core, w: &mut Walk<'_>) {
    let n = w.length(core.cpuid.len(), "CPUID leaves");
    let mut leaves: Vec<_> = core.cpuid.iter().map(|(k, v)| (*k, *v)).collect();
    leaves.resize(n, ((0, 0), [0; 4]));
    for ((leaf, subleaf), answer) in &mut leaves {
        w.number(leaf, "a CPUID leaf");
        w.number(subleaf, "a CPUID sub-leaf");
        for register in answer {
            w.number(register, "a CPUID register");
        }
    }
    core.cpuid = leaves.into_iter().collect();
}

fn words_of(core: &mut Core) -> Vec<u64> {
    let mut words = Vec::with_capacity(1024);
    visit(core, &mut Walk::Out(&mut words));
    words
}

/// The whole processor as bytes.  Its TLB is emptied (see above).
pub fn save(core: &mut Core) -> Vec<u8> {
    core.tlb.flush_all();
    core.refresh();
    let mut words = vec![MAGIC, core.tsc()];
    words.extend(words_of(core));
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// What of a guest is in the processor, as bytes.
pub fn save_live(core: &mut Core) -> Vec<u8> {
    let mut words = Vec::with_capacity(192);
    visit_live(core, &mut Walk::Out(&mut words));
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Let what [`save_live`] took be in the processor.
///
/// # Errors
/// If the bytes are nothing of the kind; the processor is as before then.
pub fn load_live(core: &mut Core, bytes: &[u8]) -> Result<(), Malformed> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(Malformed(format!("{} bytes that are no registers of a guest", bytes.len())));
    }
    let words: Vec<u64> = chunks.iter().map(|c| u64::from_le_bytes(*c)).collect();
    let mut before = Vec::with_capacity(words.len());
    visit_live(core, &mut Walk::Out(&mut before));
    let result = read(core, &words, visit_live);
    if result.is_err() {
        let _ = read(core, &before, visit_live);
    } else {
        normalize(&mut core.fx);
    }
    core.attention = 1; // generated code knows pages by the old rights
    result
}

/// A part of a processor, or all of it.
type Visit = fn(&mut Core, &mut Walk<'_>);

fn read(core: &mut Core, words: &[u64], visit: Visit) -> Result<(), Malformed> {
    let mut walk = Walk::In { words, problem: None };
    visit(core, &mut walk);
    match walk {
        Walk::In { problem: Some(p), .. } => Err(Malformed(p)),
        Walk::In { words: rest @ [_, ..], .. } => {
            Err(Malformed(format!("saved processor: {} words too many at its end", rest.len())))
        }
        _ => Ok(()),
    }
}

/// Become the processor that was saved.  The clock goes on from where it was then, on whichever
/// clock this processor has.
///
/// # Errors
/// If the bytes are no saved processor of this version; the processor is as before then.
pub fn load(core: &mut Core, bytes: &[u8]) -> Result<(), Malformed> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    let words: Vec<u64> = chunks.iter().map(|c| u64::from_le_bytes(*c)).collect();
    let (tsc, body) = match words.as_slice() {
        [MAGIC, tsc, body @ ..] if rest.is_empty() => (*tsc, body),
        [first, ..] if *first << 16 == MAGIC << 16 => {
            let words = format!("saved processor: of another version ({first:#x}; expected {MAGIC:#x})");
            return Err(Malformed(words));
        }
        _ => return Err(Malformed(format!("{} bytes that are no saved processor", bytes.len()))),
    };
    let before = words_of(core);
    let result = read(core, body, visit);
    if result.is_err() {
        // It came out of this very processor, so it goes in again.
        let _ = read(core, &before, visit);
    } else {
        normalize(&mut core.fx);
        core.tsc_skew = match core.clock {
            Clock::Virtual => tsc.wrapping_sub(core.retired()),
            Clock::Wall => 0, // the computer's clock, as in every other processor
        };
    }
    core.attention = 1;
    core.tlb.flush_all();
    core.refresh();
    result
}

/// One number for registers, x87/SSE state, system state, APIC, counters and (virtual) clock.
pub fn state_hash(core: &mut Core) -> u64 {
    let mut hasher = Hasher::default();
    for word in words_of(core) {
        hasher.word(word);
    }
    if core.clock == Clock::Virtual {
        hasher.word(core.tsc());
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::step::step;
    use crate::cpu::testbed::{long, real};
    use crate::cpu::trap::Trap;
    use crate::dbt::home::Home;

    /// Increments every fourth page of the first 4 MBytes through a TLB that soon has them all.
    fn busy() -> Home {
        let core = long(0);
        // inc dword [rdi]; add rdi,4000h; and edi,3FFFFFh; or edi,100000h; jmp
        let code = [
            0xFF, 0x07, 0x48, 0x81, 0xC7, 0, 0x40, 0, 0, 0x81, 0xE7, 0xFF, 0xFF, 0x3F, 0, 0x81, 0xCF, 0, 0,
            0x10, 0, 0xEB, 0xE9,
        ];
        assert!(core.mem.write_bytes(0x1000, &code));
        core
    }

    fn go(core: &mut Core, steps: usize) {
        for _ in 0..steps {
            if let Err(Trap::Exception(e)) = step(core) {
                panic!("{e:?} at {:#x}", core.rip);
            }
        }
    }

    fn copy_of(core: &Core) -> Home {
        let mem = crate::mem::Memory::new(core.mem.size()).unwrap();
        let mut bytes = vec![0; core.mem.size() as usize];
        assert!(core.mem.read_bytes(0, &mut bytes) && mem.write_bytes(0, &bytes));
        Home::new(mem, core.clock, 5).unwrap()
    }

    #[test]
    fn a_loaded_processor_goes_on_as_the_saved_one_to_the_last_walk_and_flag() {
        let mut a = busy();
        go(&mut a, 700);
        let bytes = save(&mut a);
        // Cleared accessed and dirty flags show who walks again.
        for entry in [a.cr3, a.cr3 + 0x2000, a.cr3 + 0x2008] {
            a.mem.store(entry, 1, a.mem.load(entry, 1) & !0x60);
        }
        let mut b = copy_of(&a);
        load(&mut b, &bytes).unwrap();
        assert_eq!(state_hash(&mut a), state_hash(&mut b));
        go(&mut a, 1500);
        go(&mut b, 1500);
        assert_eq!(state_hash(&mut a), state_hash(&mut b));
        assert_eq!(a.counts, b.counts);
        assert!(a.counts.tlb_misses > 100, "{}", a.counts.tlb_misses);
        let (mut x, mut y) = (vec![0; 4 << 20], vec![0; 4 << 20]);
        assert!(a.mem.read_bytes(0, &mut x) && b.mem.read_bytes(0, &mut y));
        assert!(x == y);
    }

    #[test]
    fn every_part_counts_for_the_hash() {
        let changes: [fn(&mut Core); 19] = [
            |c| c.gpr[15] ^= 1,
            |c| c.rip += 1,
            |c| c.random.key[3] ^= 1,
            |c| c.random.drawn += 1,
            |c| c.xcr0 ^= 2,
            |c| c.pkru ^= 4,
            |c| c.seg[5].limit ^= 1,
            |c| c.fx.0[400] ^= 1,
            |c| c.upper.change(|halves| halves[15][15] ^= 1),
            |c| c.dr[3] ^= 1,
            |c| c.msr.tsc_aux ^= 1,
            |c| c.pdpte[3] ^= 1,
            |c| c.counts.injected[255] += 1,
            |c| c.counts.exits[79] += 1,
            |c| c.apic.set_tpr(9),
            |c| c.vmx.vpid ^= 1,
            |c| c.tsc_skew += 1,
            |c| c.shadow = Shadow::Sti,
            |c| {
                c.cpuid.insert((1, 0), [0; 4]);
            },
        ];
        let plain = state_hash(&mut real());
        assert_eq!(plain, state_hash(&mut real()));
        for (i, change) in changes.iter().enumerate() {
            let mut core = real();
            change(&mut core);
            assert_ne!(plain, state_hash(&mut core), "change {i}");
        }
    }

    #[test]
    fn what_is_live_goes_to_another_processor_and_nothing_else_does() {
        let mut a = real();
        let all = words_of(&mut a).len();
        let mut walk = Vec::new();
        visit_live(&mut a, &mut Walk::Out(&mut walk));
        assert!(walk.len() > 100 && walk.len() < all);
        (a.gpr, a.cr2, a.dr[6], a.msr.star, a.pkru) = ([9; 16], 8, 0xFFFF_0FF1, 7, 4);
        (a.random.drawn, a.fx.0[400], a.pointers.fip, a.rip) = (3, 5, 6, 0x77);
        let bytes = save_live(&mut a);
        let mut b = real();
        load_live(&mut b, &bytes).unwrap();
        assert_eq!(bytes, save_live(&mut b));
        assert_eq!(real().rip, b.rip);
        let before = state_hash(&mut b);
        for at in (0..bytes.len()).step_by(8) {
            let mut bad = bytes.clone();
            bad[at..at + 8].fill(0xFF);
            if load_live(&mut b, &bad).is_ok() {
                load_live(&mut b, &bytes).unwrap();
            }
            assert_eq!(before, state_hash(&mut b), "byte {at}");
            assert!(load_live(&mut b, &bytes[..at]).is_err());
        }
    }

    #[test]
    fn an_event_on_its_way_is_saved() {
        let mut a = real();
        a.vectoring = Some(Event { vector: 14, kind: Kind::Hardware, error: Some(7), length: 0 });
        let bytes = save(&mut a);
        let mut b = copy_of(&a);
        load(&mut b, &bytes).unwrap();
        assert_eq!(a.vectoring, b.vectoring);
    }

    #[test]
    fn no_bytes_can_do_harm() {
        let mut core = real();
        let (good, before) = (save(&mut core), state_hash(&mut core));
        for cut in [0, 7, 8, 16, 100, good.len() - 8] {
            assert!(load(&mut core, &good[..cut]).is_err(), "{cut}");
        }
        let mut old = good.clone();
        old[7] = 0;
        assert!(load(&mut core, &old).unwrap_err().to_string().contains("version"));
        for at in (16..good.len()).step_by(8) {
            let mut bad = good.clone();
            bad[at..at + 8].fill(0xFF);
            if load(&mut core, &bad).is_ok() {
                load(&mut core, &good).unwrap();
            }
            assert_eq!(before, state_hash(&mut core), "byte {at}");
        }
    }
}
