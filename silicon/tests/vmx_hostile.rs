//! Whatever is in a VMCS, the machine neither panics nor hangs, and both engines agree.

mod random;
mod vmx_bed;

use random::Rng;
use silicon::arch::vmcs as f;
use silicon::cpu::state::Counts;
use silicon::processor::EngineKind;
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

struct Random(Rng);

impl Random {
    fn next(&mut self) -> u64 {
        self.0.next()
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

/// Instructions that exit, fault, or change what later ones do; none leaves flags undefined.
const SNIPPETS: [&[u8]; 27] = [
    &[0x90],
    &[0x0F, 0xA2],                               // cpuid
    &[0xF4],                                     // hlt
    &[0xFB],                                     // sti
    &[0xFA],                                     // cli
    &[0xE4, 0x60],                               // in al, 0x60
    &[0xEE],                                     // out dx, al
    &[0x0F, 0x31],                               // rdtsc
    &[0x0F, 0x32],                               // rdmsr
    &[0x0F, 0x30],                               // wrmsr
    &[0x0F, 0x20, 0xC0],                         // mov rax, cr0
    &[0x0F, 0x22, 0xC0],                         // mov cr0, rax
    &[0x0F, 0x20, 0xDB],                         // mov rbx, cr3
    &[0x0F, 0x22, 0xDB],                         // mov cr3, rbx
    &[0x0F, 0x20, 0xE0],                         // mov rax, cr4
    &[0x0F, 0x22, 0xE0],                         // mov cr4, rax
    &[0x0F, 0x06],                               // clts
    &[0x9C, 0x9D],                               // pushf; popf
    &[0x50, 0x80, 0x4C, 0x24, 0x01, 0x01, 0x9D], // push rax; or byte [rsp+1], 1; popf
    &[0x8E, 0xD0],                               // mov ss, eax
    &[0xCC],                                     // int3
    &[0xCD, 0x0E],                               // int 14
    &[0x0F, 0x01, 0xC1],                         // vmcall
    &[0x48, 0x83, 0xC0, 0x10],                   // add rax, 16
    &[0x48, 0x89, 0x03],                         // mov [rbx], rax
    &[0x48, 0xCF],                               // iretq
    &[0xEB, 0xC0],                               // jmp back
];

/// What a run came to, equal for every engine.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// 0 VMfail, 1 failed entry, 2 exit.
    first: usize,
    gpr: [u64; 16],
    retired: u64,
    rip: u64,
    counts: Counts,
}

fn attack(engine: EngineKind, seed: u64, through_memory: bool) -> Outcome {
    let mut r = Random(Rng(seed));
    let mut bed = Bed::on(engine);
    let code: Vec<u8> = (0..80).flat_map(|_| SNIPPETS[r.below(27) as usize]).copied().collect();
    bed.code(&code).gate(6, 0x40).gate(13, 0x80).gate(14, 0xC0);
    for _ in 0..=r.below(4) {
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
    let first = match bed.try_launch() {
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
    let core = bed.core();
    let (gpr, retired, rip, counts) = (core.gpr, core.retired(), core.rip, core.counts.clone());
    Outcome { first, gpr, retired, rip, counts }
}

#[test]
fn random_fields_end_in_vmfail_a_failed_entry_or_an_exit() {
    for through_memory in [false, true] {
        let mut outcomes = [0; 3];
        for seed in (1..1000).map(|n| n * 0x9E37_79B9) {
            let [plain, translated] =
                [EngineKind::Reference, EngineKind::Dbt].map(|e| attack(e, seed, through_memory));
            assert_eq!(plain, translated, "seed {seed:#x}, through memory: {through_memory}");
            outcomes[plain.first] += 1;
        }
        assert!(outcomes.iter().all(|&n| n > 50), "{outcomes:?} exercise every way");
    }
}
