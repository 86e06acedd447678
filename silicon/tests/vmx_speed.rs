//! What a world switch costs: reported, not asserted.
//! `cargo test --release --test vmx_speed -- --ignored --nocapture`

mod vmx_bed;

use std::time::Instant;

use silicon::arch::vmcs as f;
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

#[test]
#[ignore = "measures time"]
fn a_round_trip() {
    const ROUNDS: u32 = 1_000_000;
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0x0B]).launch();
    let kick = silicon::arch::exit::Exit::new(silicon::arch::exit::reason::HLT, 0);
    for (name, host_field) in [("only guest fields written", false), ("a control written", true)] {
        let start = Instant::now();
        for _ in 0..ROUNDS {
            let core = bed.core();
            let rip = vmx::vmread(core, f::GUEST_RIP).unwrap();
            vmx::vmwrite(core, f::GUEST_RIP, rip).unwrap();
            if host_field {
                vmx::vmwrite(core, f::TSC_OFFSET, 0).unwrap();
            }
            vmx::vmresume(core).unwrap();
            silicon::vmx::exit::perform(core, kick);
        }
        println!("{name}: {:?} a round trip", start.elapsed() / ROUNDS);
    }
    let start = Instant::now();
    for _ in 0..ROUNDS {
        bed.resume();
    }
    println!("with one instruction that faults: {:?}", start.elapsed() / ROUNDS);
}
