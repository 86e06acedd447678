//! A program that does the same for ever is not translated for ever: counts of the translator.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const PML4: u64 = 0x8000;
const NOPS: usize = 64;
/// Instructions of a round of [`long_loop`].
const ROUND: u64 = NOPS as u64 + 2;

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

/// 64 times nop; inc rax; jmp.
fn long_loop() -> Processor {
    let mut code = vec![0x90; NOPS];
    code.extend([0x48, 0xFF, 0xC0, 0xEB, 0xBB]);
    machine(0x1000, &code)
}

fn run(processor: &mut Processor, budget: u64) {
    assert_eq!(reason::BUDGET, processor.run(budget, &mut || false).reason);
}

#[test]
fn runs_that_end_anywhere_begin_no_blocks() {
    let mut processor = long_loop();
    for _ in 0..20 {
        run(&mut processor, 3 * ROUND + 13); // each ends somewhere else
    }
    assert_eq!(20 * (3 * ROUND + 13) / ROUND, processor.core.gpr[0]);
    assert_eq!(1, counter(&processor, "translated_blocks"));
}

#[test]
fn where_runs_end_again_and_again_a_block_begins() {
    let mut processor = long_loop();
    run(&mut processor, 20); // from here on always at this place
    for _ in 0..100 {
        run(&mut processor, 3 * ROUND);
    }
    assert_eq!((300, 0x1014), (processor.core.gpr[0], processor.core.rip));
    let before = counter(&processor, "interpreted");
    run(&mut processor, 3 * ROUND);
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

#[test]
fn a_slice_with_nothing_due_at_its_end_interprets_nothing() {
    let mut processor = long_loop();
    let mut looks = 0;
    let exit = processor.run(0, &mut || {
        looks += 1;
        looks > 20
    });
    assert_eq!(reason::KICK, exit.reason);
    assert_eq!(0, counter(&processor, "interpreted"));
}

/// mov rax, [rbx]; add rcx, [rbx + 8]; test rax, rax; jne over; mov [rbx + 16], rcx; over: inc rdx;
/// jmp.  The three accesses are one group.
const GROUP: [u8; 22] = [
    0x48, 0x8B, 0x03, 0x48, 0x03, 0x4B, 0x08, 0x48, 0x85, 0xC0, 0x75, 0x04, 0x48, 0x89, 0x4B, 0x10, 0x48,
    0xFF, 0xC2, 0x90, 0xEB, 0xEA,
];

/// Instructions interpreted in 1000 rounds of [`GROUP`] with RBX as given.
fn interpreted_with(rbx: u64, prepare: impl Fn(&mut Processor)) -> u64 {
    let mut processor = machine(0x1000, &GROUP);
    prepare(&mut processor);
    processor.core.gpr[3] = rbx;
    run(&mut processor, 9000);
    assert!(processor.core.gpr[2] >= 1000);
    counter(&processor, "interpreted")
}

#[test]
fn a_group_across_two_pages_goes_on_without_the_interpreter() {
    assert!(interpreted_with(0x3000, |_| ()) < 40);
    assert!(interpreted_with(0x2FF0, |_| ()) < 40);
}

#[test]
fn a_group_that_would_write_where_nothing_may_be_written_goes_on_without_the_interpreter() {
    let read_only = |p: &mut Processor| {
        p.core.mem.store(0xB000 + 8 * 3, 8, 3 << 12 | 1);
        p.core.mem.store(0x3000, 8, 1); // not zero: the write is jumped over
    };
    assert!(interpreted_with(0x3000, read_only) < 40);
}

#[test]
fn a_prefetch_of_any_address_does_nothing() {
    // prefetcht0 [rbx]; prefetchw [rbx + rcx * 8 + 64]; jnc back (CF is kept); hlt.
    let code = [0x0F, 0x18, 0x0B, 0x0F, 0x0D, 0x4C, 0xCB, 0x40, 0x73, 0xF6, 0xF4];
    for rbx in [0x3000, 0x2FF0, 0x20_0000, 0x8000_0000_0000, u64::MAX - 8, 1 << 63] {
        let mut processor = machine(0x1000, &code);
        processor.core.gpr[3] = rbx;
        let (registers, flags) = (processor.core.gpr, processor.core.rflags);
        run(&mut processor, 3000);
        assert_eq!((registers, flags), (processor.core.gpr, processor.core.rflags));
        assert_eq!((0x1000, 0), (processor.core.rip, counter(&processor, "interpreted")));
    }
}

#[test]
fn a_block_without_groups_is_left_when_its_code_is_overwritten() {
    // again: mov rax, [rbx]; mov rcx, [rbx + 8]; jc next; next: mov edx, 1; add rsi, rdx; jmp again;
    // mov byte [next + 1], 2; jmp again.
    let code = [
        0x48, 0x8B, 0x03, 0x48, 0x8B, 0x4B, 0x08, 0x72, 0x00, 0xBA, 1, 0, 0, 0, 0x48, 0x01, 0xD6, 0xEB, 0xED,
        0xC6, 0x05, 0xF0, 0xFF, 0xFF, 0xFF, 0x02, 0xEB, 0xE4,
    ];
    let mut processor = machine(0x1000, &code);
    processor.core.gpr[3] = 0x2FF8; // across two pages
    // The block with groups ends before this one, that without goes on through it.
    processor.core.rip = 0x1009;
    run(&mut processor, 3 + 6000);
    let before = processor.core.gpr[6];
    processor.core.rip = 0x1013;
    run(&mut processor, 2 + 6000);
    assert_eq!((1001, 3001), (before, processor.core.gpr[6]));
    assert_eq!(2, counter(&processor, "invalidated_blocks"));
}
