//! The XSAVE feature set against this computer's own: what is restored from an area, and what is then saved to
//! another one, byte for byte, under both engines.

mod in_use;
mod random;

use std::arch::asm;

use in_use::{call_in_use, untouched};
use random::Rng;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::features::is_amd;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const CODE: u64 = 0x1_0000;
const AREA: u64 = 0x2_0000;
const OUT: u64 = 0x2_1000;
const WORDS: usize = 80;
const KEYS: u64 = 1 << 9;
const COMPACTED: u64 = 1 << 63;

/// An area of the legacy region, the header, and what comes there in the compacted format.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area([u64; WORDS]);

fn area(rng: &mut Rng, has_keys: bool) -> Area {
    let mut a = [0; WORDS];
    for w in &mut a {
        *w = if rng.below(4) == 0 { 0 } else { rng.next() };
    }
    // FCW, FSW and FTW; often those after FNINIT.
    a[0] = if rng.below(3) == 0 { 0x37F } else { rng.next() & 0x00FF_7F00_0F3F | 0x40 };
    a[1] = 0;
    a[2] = 0;
    a[3] = if rng.below(2) == 0 { 0x1F80 } else { 0x1F80 | rng.next() & 0xE07F };
    let blanks = [4..20, 20..52];
    for range in blanks {
        if rng.below(3) == 0 {
            a[range].fill(0);
        }
    }
    (4..20).skip(1).step_by(2).for_each(|i| a[i] &= 0xFFFF);
    let keys = if has_keys { KEYS } else { 0 };
    let (xstate, xcomp) = if rng.below(2) == 0 { (0, 0) } else { (rng.next() & keys, COMPACTED | keys | 3) };
    (a[64], a[65]) = (xstate | rng.below(4), xcomp);
    a[66..].fill(0);
    a[72] = rng.next() & 0xFFFF_FFFC; // all of key 0, which this program lives by
    Area(a)
}

macro_rules! forms {
    ($(($name:literal, $bytes:expr)),* $(,)?) => {
        /// The instruction that saves, with [rdi].
        const CODES: &[(&str, &[u8])] = &[$(($name, &$bytes)),*];

        /// Restore from `from` and save to `out` on this computer; XINUSE between the two.
        #[target_feature(enable = "xsave")]
        unsafe fn native(which: usize, from: &Area, wanted: u32, out: &mut Area, saved: u32, has_keys: bool) -> u64 {
            let mut keep = Area([0; WORDS]);
            let mut in_use: u32;
            let mut n = 0;
            $(
                if n == which {
                    // SAFETY: the areas are aligned and long enough for the components of bits 1:0; the x87
                    // and SSE state is kept aside and put back.
                    unsafe {
                        asm!(
                            // PKRU is kept in R11, where there are keys.
                            "test r12d, r12d", "jz 2f", "xor ecx, ecx", "rdpkru", "mov r11d, eax", "2:",
                            "fxsave64 [r8]", "mov eax, r13d", "xor edx, edx", "xrstor64 [rsi]",
                            "mov eax, r9d", "xor edx, edx", concat!($name, " [rdi]"),
                            "mov ecx, 1", "xgetbv", "mov r10d, eax", "fxrstor64 [r8]",
                            "test r12d, r12d", "jz 3f",
                            "xor ecx, ecx", "xor edx, edx", "mov eax, r11d", "wrpkru", "3:",
                            in("r8") &mut keep, in("rsi") from, in("rdi") out, in("r9") saved,
                            in("r13") wanted, in("r12") u32::from(has_keys),
                            out("eax") _, out("edx") _, out("ecx") _, out("r10") in_use, out("r11") _,
                            options(nostack),
                        );
                    }
                    return u64::from(in_use);
                }
                n += 1;
            )*
            let _ = (n, keep, saved, wanted, from, has_keys);
            unreachable!("form {which}")
        }
    };
}

forms!(
    ("xsave64", [0x48, 0x0F, 0xAE, 0x27]),
    ("xsave", [0x0F, 0xAE, 0x27]),
    ("xsaveopt64", [0x48, 0x0F, 0xAE, 0x37]),
    ("xsavec64", [0x48, 0x0F, 0xC7, 0x27]),
    ("xsavec", [0x0F, 0xC7, 0x27]),
);

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
    (c.cpl, c.xcr0) = (3, 0x203);
    c.refresh();
    p
}

/// xrstor64 [rsi]; mov eax,r9d; xor edx,edx; SAVE; mov ecx,1; xgetbv
fn program(save: &[u8]) -> Vec<u8> {
    let before: &[u8] = &[0x48, 0x0F, 0xAE, 0x2E, 0x44, 0x89, 0xC8, 0x31, 0xD2];
    [before, save, &[0xB9, 1, 0, 0, 0, 0x0F, 0x01, 0xD0]].concat()
}

fn to_bytes(a: &Area) -> Vec<u8> {
    a.0.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Whether this computer has it all.
fn can_compare() -> bool {
    ["xsave", "xsavec", "xsaveopt"].iter().all(|name| match *name {
        "xsave" => is_x86_feature_detected!("xsave"),
        "xsavec" => is_x86_feature_detected!("xsavec"),
        _ => is_x86_feature_detected!("xsaveopt"),
    })
}

/// CPUID.7.ECX.OSPKE
fn has_keys() -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0
}

#[test]
fn areas_are_restored_and_saved_as_by_the_computer() {
    if !can_compare() {
        return;
    }
    let mut machines = [EngineKind::Reference, EngineKind::Dbt].map(machine);
    let mut rng = Rng(0x5EED);
    let (mut seen, mut keys) = ([0; 4], 0);
    let has_keys = has_keys();
    for round in 0..4000 {
        let (from, fill) = (area(&mut rng, has_keys), area(&mut rng, has_keys));
        let which = rng.below(CODES.len() as u64) as usize;
        let (name, save) = CODES[which];
        let with_keys = has_keys && from.0[65] != 0;
        let (wanted, relevant) = if with_keys { (0x203, 0x203) } else { (3, 3) };
        // (In the standard format PKRU is elsewhere on AMD's processors.)
        let saved = (rng.next() & if name.starts_with("xsavec") { relevant } else { 3 }) as u32;
        let mut filled = fill;
        filled.0[65] = 0;
        let (mut theirs, mut in_use) = (filled, relevant);
        theirs.0[64] = u64::MAX;
        // (A component that another program's turn has brought in may be called in use, and saved, though it is
        // as it was at first: the computer is asked several times, and answers with the least in use.)
        for _ in 0..8 {
            let mut out = filled;
            // SAFETY: this computer has the instructions.
            let now = unsafe { native(which, &from, wanted, &mut out, saved, has_keys) } & relevant;
            if now & in_use == now && out.0[64] & theirs.0[64] == out.0[64] {
                (theirs, in_use) = (out, now);
            }
        }
        for p in &mut machines {
            let code = program(save);
            for (at, bytes) in [(CODE, &code), (AREA, &to_bytes(&from)), (OUT, &to_bytes(&filled))] {
                assert!(p.core.mem.write_bytes(at, bytes));
            }
            let c = &mut *p.core;
            c.rip = CODE;
            (c.gpr[0], c.gpr[2]) = (u64::from(wanted), 0);
            (c.gpr[6], c.gpr[7], c.gpr[9]) = (AREA, OUT, u64::from(saved));
            p.run(6, &mut || false);
            assert_eq!(CODE + code.len() as u64, p.core.rip, "{name}");
            let mut bytes = vec![0; 8 * WORDS];
            assert!(p.core.mem.read_bytes(OUT, &mut bytes));
            let mut ours = Area([0; WORDS]);
            for (w, b) in ours.0.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *w = u64::from_le_bytes(*b);
            }
            let untouched = if is_amd() { 0 } else { untouched(p) };
            let saved_more = theirs.0[64] & !ours.0[64] & u64::from(saved) & untouched;
            call_in_use(&mut ours.0, saved_more, name.starts_with("xsavec"));
            p.core.gpr[0] |= in_use & untouched;
            // The mask of MXCSR differs between makers.
            ours.0[3] = ours.0[3] & 0xFFFF_FFFF | theirs.0[3] & !0xFFFF_FFFF;
            for (i, (a, b)) in theirs.0.iter().zip(&ours.0).enumerate() {
                assert_eq!(a, b, "{name} {saved}, round {round}, byte {:#x}: {:x?}", 8 * i, from.0);
            }
            assert_eq!(in_use, p.core.gpr[0] & relevant, "{name}, round {round}: XINUSE of {:x?}", from.0);
        }
        seen[in_use as usize & 3] += 1;
        keys += in_use >> 9;
    }
    assert!(seen[3] > 100 && (keys > 100 || !has_keys), "{seen:?}, {keys}");
}
