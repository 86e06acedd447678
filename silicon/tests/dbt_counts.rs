//! What translated code costs beside running: counts for fixed programs, which must not grow unseen.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const PML4: u64 = 0x8000;
/// Where code is: 32 MBytes from here are mapped where they are, in large pages.
const CODE: u64 = 0x20_0000;
const STRIDE: u64 = 0x1040;
const MILLION: u64 = 1_000_000;

fn machine() -> Processor {
    let mem = Memory::new(1 << 26).unwrap();
    for (table, entry) in [(PML4, 0x9003), (0x9000, 0xA003)] {
        mem.store(table, 8, entry);
    }
    (0..32).for_each(|i| mem.store(0xA000 + 8 * i, 8, i << 21 | 0x83));
    let mut processor = Processor::new(mem, EngineKind::Dbt, Clock::Virtual, 0).unwrap();
    let core = &mut *processor.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer) = (0x8001_0033, PML4, 0x20, 0x500);
    (core.rip, core.gpr[4]) = (CODE, 0x10_0000);
    core.refresh();
    processor
}

/// What a million instructions take of `names`, once all is translated.
fn of_a_million(processor: &mut Processor, names: [&str; 3]) -> [u64; 3] {
    let mut run = |budget| assert_eq!(reason::BUDGET, processor.run(budget, &mut || false).reason);
    run(MILLION);
    let before = names.map(|name| counter(processor, name));
    assert_eq!(reason::BUDGET, processor.run(MILLION, &mut || false).reason);
    std::array::from_fn(|i| counter(processor, names[i]) - before[i])
}

fn displacement(from: u64, to: u64) -> [u8; 4] {
    (to.wrapping_sub(from) as i32).to_le_bytes()
}

/// `count` functions in as many pages, called in turn for ever: mov rax, [rsp]; add rbx, rax; ret.
fn calls(processor: &Processor, count: u64) {
    let mut at = CODE;
    for i in 1..=count {
        let function = CODE + 0x10_0000 + i * STRIDE;
        processor.core.mem.write_bytes(function, &[0x48, 0x8B, 0x04, 0x24, 0x48, 0x01, 0xC3, 0xC3]);
        processor.core.mem.write_bytes(at, &[0xE8]);
        processor.core.mem.write_bytes(at + 1, &displacement(at + 5, function));
        at += 5;
    }
    processor.core.mem.write_bytes(at, &[0xE9]);
    processor.core.mem.write_bytes(at + 1, &displacement(at + 5, CODE));
}

/// Links and the table of indirect targets hold a program of megabytes: five entries are the slices.
#[test]
fn calls_between_thousands_of_pages_find_their_blocks() {
    let mut processor = machine();
    calls(&processor, 3000);
    let [entries, lookups, links] = of_a_million(&mut processor, ["entries", "lookups", "links"]);
    assert!(entries <= 12, "{entries} entries");
    assert!(lookups <= MILLION / 50, "{lookups} look-ups");
    assert_eq!(0, links);
}

/// The usual mixture: a load, arithmetic, a store, a conditional jump.
#[test]
fn an_instruction_becomes_so_many_bytes() {
    let mut processor = machine();
    // mov rax, [rdi+rcx*8]; add rax, rdx; mov [rsi+rcx*8], rax; lea rdx, [rdx+3]; inc rcx;
    // and ecx, 255; cmp rax, rbx; jb over; xor rdx, rax; over: jmp.
    let code = [
        0x48, 0x8B, 0x04, 0xCF, 0x48, 0x01, 0xD0, 0x48, 0x89, 0x04, 0xCE, 0x48, 0x8D, 0x52, 0x03, 0x48, 0xFF,
        0xC1, 0x81, 0xE1, 0xFF, 0, 0, 0, 0x48, 0x39, 0xD8, 0x72, 0x03, 0x48, 0x31, 0xC2, 0xEB, 0xDE,
    ];
    processor.core.mem.write_bytes(CODE, &code);
    (processor.core.gpr[7], processor.core.gpr[6]) = (0x4_0000, 0x5_0000);
    let [bytes, instructions, entries] =
        of_a_million(&mut processor, ["emitted_bytes", "translated_instructions", "entries"]);
    assert_eq!((0, 0), (bytes, instructions));
    assert!(entries <= 12, "{entries} entries");
    let (bytes, instructions) =
        (counter(&processor, "emitted_bytes"), counter(&processor, "translated_instructions"));
    assert!(bytes <= 75 * instructions, "{bytes} bytes for {instructions} instructions");
}
