//! Whatever is in a VMCS, the machine neither panics nor hangs.

mod vmx_bed;

use silicon::arch::vmcs as f;
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

/// xorshift64*, so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Mostly small changes of a valid value, sometimes anything.
    fn around(&mut self, value: u64) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => value ^ 1 << self.below(64),
            2 => value ^ 1 << self.below(17),
            _ => value.wrapping_add(self.below(33)).wrapping_sub(16),
        }
    }
}

/// How the entries ended: VMfail, failed entry, exit.
fn attack(seed: u64, through_memory: bool) -> usize {
    let mut r = Random(seed);
    let mut bed = Bed::new();
    let noise: Vec<u8> = (0..256).map(|_| r.next() as u8).collect();
    bed.code(&noise).gate(6, 0x40).gate(13, 0x80).gate(14, 0xC0);
    for _ in 0..1 + r.below(4) {
        let (field, _) = f::FIELDS[r.below(f::FIELDS.len() as u64) as usize];
        let old = bed.read(field);
        let new = r.around(old);
        if through_memory {
            let at = VMCS + f::locate(field).unwrap();
            bed.core().mem.store(at, 8, new);
        } else if f::type_of(field) != f::Type::ExitInformation {
            bed.write(field, new);
        }
    }
    let outcome = match bed.try_launch() {
        Err(_) => 0,
        Ok(e) if e.entry_failure => 1,
        Ok(_) => 2,
    };
    // Go on a few times from wherever that led.
    for _ in 0..3 {
        if !bed.core().vmx.non_root && vmx::vmresume(bed.core()).is_err() {
            break;
        }
        bed.run();
    }
    outcome
}

#[test]
fn random_fields_end_in_vmfail_a_failed_entry_or_an_exit() {
    for through_memory in [false, true] {
        let mut outcomes = [0; 3];
        for seed in 1..3000 {
            outcomes[attack(seed * 0x9E37_79B9, through_memory)] += 1;
        }
        assert!(outcomes.iter().all(|&n| n > 100), "{outcomes:?} exercise every way");
    }
}
