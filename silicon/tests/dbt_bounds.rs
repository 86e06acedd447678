//! What the translator keeps does not grow without end, whatever a guest makes of its code.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::dbt::cache::{LEAST_BYTES, REGIONS};
use silicon::dbt::drop::{CODE_FOR_PAGE, NOTES_FOR_CODE};
use silicon::mem::Memory;
use silicon::processor::Processor;

const PML4: u64 = 0x8000;
/// Where code is: 2 MBytes from here are mapped where they are.
const CODE: u64 = 0x2_0000;

/// 64-bit code at [`CODE`], and a translator with the smallest cache.
fn machine(code: &[u8]) -> Processor {
    let mem = Memory::new(1 << 21).unwrap();
    for (table, entry) in [(PML4, 0x9003), (0x9000, 0xA003), (0xA000, 0xB003)] {
        mem.store(table, 8, entry);
    }
    (0..512).for_each(|i| mem.store(0xB000 + 8 * i, 8, i << 12 | 3));
    mem.write_bytes(CODE, code);
    let mut processor = Processor::with_code_bytes(mem, Clock::Virtual, 0, LEAST_BYTES).unwrap();
    let core = &mut *processor.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer, core.rip) = (0x8001_0033, PML4, 0x20, 0x500, CODE);
    core.refresh();
    processor
}

fn run(processor: &mut Processor, budget: u64) {
    assert_eq!(reason::BUDGET, processor.run(budget, &mut || false).reason);
}

/// What is kept is in bounds.
fn check(processor: &Processor) {
    assert!(counter(processor, "code_bytes") <= LEAST_BYTES as u64);
    // (A block looks at two pages.)
    assert!(counter(processor, "code_pages") <= (LEAST_BYTES / CODE_FOR_PAGE) as u64 + 2);
    // (The last block of a region may have begun just before its bound.)
    let most = (NOTES_FOR_CODE * LEAST_BYTES + REGIONS * 16384) as u64;
    assert!(counter(processor, "note_bytes") <= most, "{}", counter(processor, "note_bytes"));
}

/// Jumps to the next instruction, then RAX grows, and all begins again: the smallest blocks.
fn jumps(count: usize) -> Vec<u8> {
    let mut code = [0xEB, 0x00].repeat(count);
    code.extend([0x48, 0xFF, 0xC0, 0xE9]); // inc rax; jmp
    code.extend((-(2 * count as i32) - 8).to_le_bytes());
    code
}

#[test]
fn of_nothing_but_jumps() {
    let count = 40_000;
    let mut processor = machine(&jumps(count));
    for round in 1..=3 {
        run(&mut processor, count as u64 + 2);
        assert_eq!(round, processor.core.gpr[0]);
        check(&processor);
    }
    assert!(counter(&processor, "cache_recycled") > 2 * REGIONS as u64);
    assert_eq!(0, counter(&processor, "cache_flushes"));
    // What a round needs is more than fits, so each round translates all of it again.
    // (But for a round's last instructions, which are too few for a block.)
    assert!(counter(&processor, "translated_blocks") >= 3 * (count as u64 - 100));
    assert!(counter(&processor, "blocks") < count as u64);
}

/// When the cache is full, only the oldest of it is dropped.
#[test]
fn the_youngest_outlives_an_overflow() {
    let mut processor = machine(&jumps(4000));
    let mut turn = |at: u64, count: usize| {
        processor.core.mem.write_bytes(at, &jumps(count));
        processor.core.rip = at;
        let before = ["translated_blocks", "cache_recycled"].map(|name| counter(&processor, name));
        run(&mut processor, count as u64 + 2);
        check(&processor);
        let after = ["translated_blocks", "cache_recycled"].map(|name| counter(&processor, name));
        [after[0] - before[0], after[1] - before[1]]
    };
    assert_eq!(0, turn(CODE, 4000)[1]);
    assert!(turn(CODE + 0x10_0000, 300)[0] > 200);
    assert!((1..REGIONS as u64 / 2).contains(&turn(CODE + 0x12_0000, 2500)[1]));
    processor.core.rip = CODE + 0x10_0000;
    let before = counter(&processor, "translated_blocks");
    run(&mut processor, 302);
    assert_eq!(before, counter(&processor, "translated_blocks"));
}

/// A loop that overwrites the constant of its own instruction.
#[test]
fn of_code_that_is_rewritten_for_ever() {
    // mov byte [rip + 2], cl; inc ecx; mov eax, imm32; add rbx, rax; jmp.
    let code =
        [0x88, 0x0D, 0x03, 0x00, 0x00, 0x00, 0xFF, 0xC1, 0xB8, 0, 0, 0, 0, 0x48, 0x01, 0xC3, 0xEB, 0xEE];
    let mut processor = machine(&code);
    let rounds = 20_000;
    run(&mut processor, 5 * rounds);
    assert_eq!(rounds, processor.core.gpr[1]);
    assert_eq!((0..rounds).map(|i| i & 0xFF).sum::<u64>(), processor.core.gpr[3]);
    check(&processor);
    assert_eq!(0, counter(&processor, "cache_flushes"));
}

/// The same code at ever other addresses: every one makes blocks and a code page.
#[test]
fn of_code_that_is_mapped_elsewhere_for_ever() {
    let mut processor = machine(&[0xEB, 0x00, 0xEB, 0xFE]); // jmp; jmp itself
    let directory = 0xC000;
    processor.core.mem.store(0xA008, 8, directory | 3);
    (0..512).for_each(|i| processor.core.mem.store(directory + 8 * i, 8, CODE | 3));
    let rounds = 12;
    for round in 0..rounds {
        processor.core.mem.store(0x9000 + 8 * round, 8, 0xA003);
        for page in 0..512 {
            processor.core.rip = (round << 30) + 0x20_0000 + (page << 12);
            run(&mut processor, 200);
        }
        check(&processor);
    }
    assert!(counter(&processor, "translated_blocks") >= 2 * 512 * rounds);
    assert!(counter(&processor, "cache_recycled") > 0 && counter(&processor, "cache_flushes") > 0);
}
