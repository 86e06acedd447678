//! Random programs end alike on the machine and on this computer's own processor, under either
//! engine (see `examples/fuzz`, of which this is a short run with a fixed seed).

#[path = "../examples/fuzz/case.rs"]
mod case;
#[path = "../examples/fuzz/computer.rs"]
mod computer;
#[path = "../examples/fuzz/generate.rs"]
mod generate;
#[path = "../examples/fuzz/machine.rs"]
mod machine;
#[path = "../examples/fuzz/session.rs"]
mod session;
#[path = "../examples/fuzz/values.rs"]
mod values;

use silicon::processor::EngineKind;

fn agrees(engine: EngineKind, instructions: u64) {
    let options = session::Options { seed: 20, instructions, first: 0, engine, wide: 70, patience: 3 };
    let sum = session::run(&options).unwrap();
    assert!(sum.differences.is_empty(), "{}", sum.differences.join("\n"));
    assert!(sum.instructions >= instructions, "{} of {instructions} instructions", sum.instructions);
    // #DE, #BP, #UD, #GP, #PF, #MF and #XM all occurred.
    assert!([0, 3, 6, 13, 14, 16, 19].iter().all(|&v| sum.endings[v] > 0), "{:?}", sum.endings);
}

#[test]
fn the_reference_engine_agrees_with_the_computer() {
    agrees(EngineKind::Reference, 250_000);
}
