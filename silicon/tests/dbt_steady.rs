//! A program that does the same for ever is not translated for ever: counts of the translator.

use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const PML4: u64 = 0x8000;
const NOPS: usize = 64;

/// 64-bit code at `at`, 2 MBytes mapped where they are in pages of 4 KBytes.
fn machine(at: u64, code: &[u8]) -> Processor {
    let mem = Memory::new(1 << 21).unwrap();
    for (table, entry) in [(PML4, 0x9003), (0x9000, 0xA003), (0xA000, 0xB003)] {
        mem.store(table, 8, entry);
    }
    (0..512).for_each(|i| mem.store(0xB000 + 8 * i, 8, i << 12 | 3));
    mem.write_bytes(at, code);
    let mut processor = Processor::new(mem, EngineKind::Dbt, Clock::Virtual, 0).unwrap();
    let core = &mut *processor.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer, core.rip) = (0x8001_0033, PML4, 0x20, 0x500, at);
    core.refresh();
    processor
}

fn counter(processor: &Processor, name: &str) -> u64 {
    processor.statistics().into_iter().find(|s| s.0 == name).unwrap().1
}

fn run(processor: &mut Processor, budget: u64) {
    assert_eq!(reason::BUDGET, processor.run(budget, &mut || false).reason);
}

#[test]
fn runs_that_end_anywhere_begin_no_blocks() {
    // 64 times nop; inc rax; jmp.
    let mut code = vec![0x90; NOPS];
    code.extend([0x48, 0xFF, 0xC0, 0xEB, 0xBB]);
    let mut processor = machine(0x1000, &code);
    let round = NOPS as u64 + 2;
    for _ in 0..20 {
        run(&mut processor, 3 * round + 13); // each ends somewhere else
    }
    assert_eq!(20 * (3 * round + 13) / round, processor.core.gpr[0]);
    assert_eq!(1, counter(&processor, "translated_blocks"));
}

#[test]
fn where_runs_end_again_and_again_a_block_begins() {
    let mut code = vec![0x90; NOPS];
    code.extend([0x48, 0xFF, 0xC0, 0xEB, 0xBB]);
    let mut processor = machine(0x1000, &code);
    let round = NOPS as u64 + 2;
    run(&mut processor, 20); // from here on always at this place
    for _ in 0..100 {
        run(&mut processor, 3 * round);
    }
    assert_eq!((300, 0x1014), (processor.core.gpr[0], processor.core.rip));
    let before = counter(&processor, "interpreted");
    run(&mut processor, 3 * round);
    // What is left is the end of a budget, which is shorter than a block.
    assert!(counter(&processor, "interpreted") - before <= 20);
    assert!(counter(&processor, "translated_blocks") >= 2);
}

#[test]
fn a_block_across_two_pages_is_translated_again_but_once() {
    // mov cr3, rbx, and no other page is known; add rax, 1, two bytes in each page; jmp.
    let code = [0x0F, 0x22, 0xDB, 0x48, 0x83, 0xC0, 0x01, 0xEB, 0xF7];
    let mut processor = machine(0x1FFB, &code);
    processor.core.gpr[3] = PML4;
    let round = 3;
    run(&mut processor, 100 * round);
    let before = counter(&processor, "translated_blocks");
    run(&mut processor, 100 * round);
    assert_eq!(200, processor.core.gpr[0]);
    assert_eq!(before, counter(&processor, "translated_blocks"));
    assert_eq!(1, counter(&processor, "invalidated_blocks"));
}
