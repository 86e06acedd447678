//! The upper halves of YMM registers against this computer's own: what XRSTOR makes of them, what an
//! instruction then does to them, and what each form of XSAVE says and stores, byte for byte, under both
//! engines; and the sizes that CPUID tells.

mod in_use;
mod random;

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

use in_use::{call_in_use, untouched};
use random::Rng;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::features::is_amd;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const CODE: u64 = 0x1_0000;
const BASE: u64 = 0x2_0000;
const FROM: u64 = 0x2_1000;
const OUT: u64 = 0x2_2000;
/// The legacy region, the header, and the upper halves.
const WORDS: usize = 104;
const XMM: std::ops::Range<usize> = 20..52;
const UPPER: std::ops::Range<usize> = 72..WORDS;
const HEADER: usize = 64;
const COMPACTED: u64 = 1 << 63;
const AVX: u64 = 4;

const SAVES: [(&str, &[u8]); 6] = [
    ("xsave64", &[0x48, 0x0F, 0xAE, 0x27]),
    ("xsave", &[0x0F, 0xAE, 0x27]),
    ("xsaveopt64", &[0x48, 0x0F, 0xAE, 0x37]),
    ("xsaveopt", &[0x0F, 0xAE, 0x37]),
    ("xsavec64", &[0x48, 0x0F, 0xC7, 0x27]),
    ("xsavec", &[0x0F, 0xC7, 0x27]),
];

/// What is executed between restoring and saving.
const BETWEEN: [(&str, &[u8]); 10] = [
    ("nothing", &[]),
    ("vzeroupper", &[0xC5, 0xF8, 0x77]),
    ("vzeroall", &[0xC5, 0xFC, 0x77]),
    ("andps xmm2, xmm3", &[0x0F, 0x54, 0xD3]),
    ("vandps xmm2, xmm3, xmm4", &[0xC5, 0xE0, 0x54, 0xD4]),
    ("vandps ymm2, ymm3, ymm4", &[0xC5, 0xE4, 0x54, 0xD4]),
    ("vmovups ymm15, [rsi + 160]", &[0xC5, 0x7C, 0x10, 0xBE, 0xA0, 0, 0, 0]),
    ("vextractf128 xmm9, ymm8, 1", &[0xC4, 0x43, 0x7D, 0x19, 0xC1, 1]),
    ("movups xmm15, [rsi + 160]", &[0x44, 0x0F, 0x10, 0xBE, 0xA0, 0, 0, 0]),
    ("vzeroupper; vandps ymm1, ymm3, ymm4", &[0xC5, 0xF8, 0x77, 0xC5, 0xE4, 0x54, 0xCC]),
];

#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area([u64; WORDS]);

/// An area to restore from, in either format.
fn area(rng: &mut Rng) -> Area {
    let mut a = [0; WORDS];
    (a[0], a[3]) = (0x37F, if rng.below(2) == 0 { 0x1F80 } else { 0x1F80 | rng.next() & 0xE07F });
    for range in [XMM, UPPER] {
        if rng.below(3) != 0 {
            a[range].fill_with(|| if rng.below(4) == 0 { 0 } else { rng.next() });
        }
    }
    if rng.below(2) == 0 {
        a[HEADER] = rng.below(8);
    } else {
        let there = rng.below(8);
        (a[HEADER], a[HEADER + 1]) = (rng.next() & there, COMPACTED | there);
    }
    Area(a)
}

/// An area with everything in it, so that what comes next finds the same state each time.
fn whole(rng: &mut Rng) -> Area {
    let mut a = area(rng);
    (a.0[HEADER], a.0[HEADER + 1]) = (7, 0);
    a
}

/// mov eax,7; xor edx,edx; xrstor64 [r10]; mov eax,r11d; xrstor64 [rsi]; …; mov eax,r9d; SAVE [rdi];
/// mov ecx,1; xgetbv
fn program(between: &[u8], save: &[u8]) -> Vec<u8> {
    let first: &[u8] = &[0xB8, 7, 0, 0, 0, 0x31, 0xD2, 0x49, 0x0F, 0xAE, 0x2A];
    let then: &[u8] = &[0x44, 0x89, 0xD8, 0x48, 0x0F, 0xAE, 0x2E];
    [first, then, between, &[0x44, 0x89, 0xC8], save, &[0xB9, 1, 0, 0, 0, 0x0F, 0x01, 0xD0]].concat()
}

/// A page of code of this computer's.
struct Page(*mut u8);

impl Page {
    fn new() -> Self {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE);
        // SAFETY: a new mapping of one page.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(libc::MAP_FAILED, at);
        Self(at.cast())
    }

    /// Run a program on this computer; XINUSE after it.
    fn run(&self, code: &[u8], base: &Area, from: &Area, wanted: u64, out: &mut Area, saved: u64) -> u64 {
        let mut keep = Area([0; WORDS]);
        let in_use: u64;
        let code = [code, &[0xC3]].concat();
        // SAFETY: the program fits into the page, returns, writes to `out` alone, and what it does to the state
        // that XSAVE knows is undone; the areas are aligned and as long as components 0 to 2 are.
        unsafe {
            self.0.copy_from_nonoverlapping(code.as_ptr(), code.len());
            asm!(
                "mov eax, 7", "xor edx, edx", "xsave64 [r8]", "call r12",
                "mov r13d, eax", "mov eax, 7", "xor edx, edx", "xrstor64 [r8]",
                in("r8") &raw mut keep, in("r10") &raw const *base, in("rsi") &raw const *from, in("rdi") &raw mut *out, in("r9") saved,
                in("r11") wanted, in("r12") self.0, out("r13") in_use,
                out("rax") _, out("rdx") _, out("rcx") _,
            );
        }
        in_use
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

fn machine(engine: EngineKind) -> Processor {
    let mem = Memory::new(1 << 20).unwrap();
    for (at, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x87)] {
        mem.store(at, 8, value);
    }
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = (0x8001_0031, 0x1000, 0x4_0620, 0x500);
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC0F3, selector: 0x13 }; 6];
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xA0FB, selector: 0xB };
    (c.cpl, c.xcr0) = (3, 7);
    c.refresh();
    p
}

fn to_bytes(a: &Area) -> Vec<u8> {
    a.0.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Whether this computer has it all, and its system has enabled it.
fn can_compare() -> bool {
    let has_forms = is_x86_feature_detected!("xsavec") && is_x86_feature_detected!("xsaveopt");
    has_forms && is_x86_feature_detected!("avx")
}

#[test]
fn upper_halves_are_restored_changed_and_saved_as_by_the_computer() {
    if !can_compare() {
        return;
    }
    let page = Page::new();
    let mut machines = [EngineKind::Reference, EngineKind::Dbt].map(machine);
    let mut rng = Rng(0xA5EED);
    let (mut seen, mut zeros) = ([[0; 2]; BETWEEN.len()], 0);
    for round in 0..20_000 {
        let (base, from, mut filled) = (whole(&mut rng), area(&mut rng), area(&mut rng));
        filled.0[HEADER + 1] = 0;
        let (wanted, saved) = (rng.below(8), rng.below(8));
        let between = rng.below(BETWEEN.len() as u64) as usize;
        let (save_name, save) = SAVES[rng.below(SAVES.len() as u64) as usize];
        let code = program(BETWEEN[between].1, save);
        let name = format!("{}; {save_name} {saved}, round {round}", BETWEEN[between].0);
        // (A component that another program's turn has brought in may be called in use, or saved, though it is as
        // it was at first: of several runs that counts which found least.)
        let (mut theirs, mut in_use) = (filled, u64::MAX);
        theirs.0[HEADER] = u64::MAX;
        for _ in 0..8 {
            let mut out = filled;
            let found = page.run(&code, &base, &from, wanted, &mut out, saved) & 7;
            if found & in_use == found && out.0[HEADER] & theirs.0[HEADER] == out.0[HEADER] {
                (theirs, in_use) = (out, found);
            }
        }
        for p in &mut machines {
            for (at, bytes) in
                [(CODE, &code), (BASE, &to_bytes(&base)), (FROM, &to_bytes(&from)), (OUT, &to_bytes(&filled))]
            {
                assert!(p.core.mem.write_bytes(at, bytes));
            }
            let c = &mut *p.core;
            c.rip = CODE;
            (c.gpr[6], c.gpr[7], c.gpr[9], c.gpr[10], c.gpr[11]) = (FROM, OUT, saved, BASE, wanted);
            let steps = 9 + [0, 1, 1, 1, 1, 1, 1, 1, 1, 2][between];
            p.run(steps, &mut || false);
            assert_eq!(CODE + code.len() as u64, p.core.rip, "{name}");
            let mut bytes = vec![0; 8 * WORDS];
            assert!(p.core.mem.read_bytes(OUT, &mut bytes));
            let mut ours = Area([0; WORDS]);
            for (w, b) in ours.0.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *w = u64::from_le_bytes(*b);
            }
            // (On AMD's processors only after a register was written to.)
            let untouched = if between == 0 && is_amd() { 0 } else { untouched(p) };
            let said_more = in_use & !p.core.gpr[0] & untouched;
            let saved_more = theirs.0[HEADER] & !ours.0[HEADER] & saved & untouched;
            p.core.gpr[0] |= said_more;
            call_in_use(&mut ours.0, saved_more, save_name.starts_with("xsavec"));
            zeros += u32::from((said_more | saved_more) != 0);
            // The mask of MXCSR differs between makers.
            ours.0[3] = ours.0[3] & 0xFFFF_FFFF | theirs.0[3] & !0xFFFF_FFFF;
            for (i, (a, b)) in theirs.0.iter().zip(&ours.0).enumerate() {
                assert_eq!(a, b, "{name}, wanted {wanted}, byte {:#x}: {:x?}", 8 * i, from.0);
            }
            assert_eq!(in_use, p.core.gpr[0] & 7, "{name}, wanted {wanted}: XINUSE of {:x?}", from.0);
        }
        seen[between][usize::from(in_use & AVX != 0)] += 1;
    }
    for ((name, _), [clear, used]) in BETWEEN.iter().zip(seen) {
        assert!(clear > 100 || name.contains("ymm"), "{name}: {seen:?}");
        assert!(used > 100 || ["vzeroupper", "vzeroall"].contains(name), "{name}: {seen:?}");
    }
    assert!(!is_amd() || zeros < 20_000, "{zeros} of 80 000 are excused");
    assert_eq!([0, 0], [seen[1][1], seen[2][1]], "what is cleared is not in use");
}

#[test]
fn cpuid_tells_the_sizes_that_the_computer_does() {
    if !can_compare() {
        return;
    }
    assert_eq!((256, 576), (__cpuid_count(0xD, 2).eax, __cpuid_count(0xD, 2).ebx));
    // SAFETY: XSAVE is enabled.
    let xcr0 = unsafe { _xgetbv(0) };
    if xcr0 != 7 {
        return; // with more than this the areas are longer, and differ between makers
    }
    let rows = [0, 1].map(|subleaf| __cpuid_count(0xD, subleaf));
    for p in &mut [EngineKind::Reference, EngineKind::Dbt].map(machine) {
        for (subleaf, theirs) in (0..).zip(rows) {
            let c = &mut *p.core;
            c.cpuid.insert((0xD, subleaf), [theirs.eax, 0, theirs.ecx, theirs.edx]);
            assert!(c.mem.write_bytes(CODE, &[0x0F, 0xA2])); // cpuid
            (c.rip, c.gpr[0], c.gpr[1]) = (CODE, 0xD, subleaf.into());
            p.run(1, &mut || false);
            // (IA32_XSS of the computer's system counts in sub-leaf 1; none of its components is smaller than 8 bytes.)
            let is_alike = u64::from(theirs.ebx) == p.core.gpr[3];
            assert!(is_alike || subleaf == 1 && u64::from(theirs.ebx) > p.core.gpr[3], "{theirs:?}");
        }
    }
}
