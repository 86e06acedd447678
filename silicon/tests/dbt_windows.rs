//! Windows: 32-bit programs that access memory by the computer's own page tables do what they do
//! without, to the last count; and what the TLB loses, their windows lose.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::dbt::promotion::Windows;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

const DIRECTORY: u64 = 0x1000;
/// Of the first 4 MBytes, and of the last.
const TABLES: [u64; 2] = [0x2000, 0x3000];
const CODE: u64 = 0x1_0000;
const HANDLER: u64 = 0x1_8000;
const IDT: u64 = 0x9000;
const USER: u64 = 7;

/// For ever: pushes, calls, FS with a base, read-modify-writes whose flags are used, bytes, a DIV by
/// memory, an x87 and an SSE operand, the last bytes of the address space.
const PROGRAM: &[u8] = &[
    0x51, // again: push ecx
    0x6A, 0xFB, // push -5
    0xE8, 0x24, 0x00, 0x00, 0x00, // call f
    0x83, 0xC4, 0x04, // add esp, 4
    0x59, // pop ecx
    0x41, // inc ecx
    0x89, 0xCE, // mov esi, ecx
    0x81, 0xE6, 0xFC, 0x3F, 0x00, 0x00, // and esi, 3FFCh
    0x88, 0xAE, 0x00, 0x00, 0x03, 0x00, // mov [esi + 30000h], ch
    0x8A, 0xBC, 0xB6, 0x00, 0x00, 0x03, 0x00, // mov bh, [esi + esi * 4 + 30000h]
    0x09, 0x0D, 0xFC, 0xFF, 0xFF, 0xFF, // or [0FFFFFFFCh], ecx
    0xEB, 0xD6, // jmp again
    0x90, 0x90, 0x55, // f: push ebp
    0x89, 0xE5, // mov ebp, esp
    0x8B, 0x45, 0x0C, // mov eax, [ebp + 12]
    0x11, 0x05, 0x00, 0x00, 0x03, 0x00, // adc [30000h], eax
    0x73, 0x01, // jnc over
    0x43, // inc ebx
    0x64, 0x8B, 0x14, 0x8D, 0x04, 0x00, 0x00, 0x00, // over: mov edx, [fs:ecx * 4 + 4]
    0x42, // inc edx
    0x64, 0x89, 0x15, 0xFC, 0xFF, 0xFF, 0xFF, // mov [fs:-4], edx
    0x31, 0xD2, // xor edx, edx
    0x80, 0x0D, 0x10, 0x00, 0x03, 0x00, 0x01, // or byte [30010h], 1
    0xF7, 0x35, 0x10, 0x00, 0x03, 0x00, // div dword [30010h]
    0xDB, 0x05, 0x20, 0x00, 0x03, 0x00, // fild dword [30020h]
    0xDB, 0x1D, 0x24, 0x00, 0x03, 0x00, // fistp dword [30024h]
    0x66, 0x0F, 0xFE, 0x05, 0x40, 0x00, 0x03, 0x00, // paddd xmm0, [30040h]
    0xC9, // leave
    0xC3, // ret
];

fn page(mem: &Memory, gva: u64, entry: u64) {
    mem.store(TABLES[usize::from(gva >> 22 != 0)] + 4 * (gva >> 12 & 1023), 4, entry);
}

/// A processor at the program's first instruction, at CPL 3: the first 4 MBytes are mapped where they
/// are, the last page of all to 80000H.
fn machine(engine: EngineKind, windows: Windows) -> Processor {
    let mem = Memory::new(4 << 20).unwrap();
    mem.write_bytes(CODE, PROGRAM);
    mem.store(DIRECTORY, 4, TABLES[0] | USER);
    mem.store(DIRECTORY + 4 * 1023, 4, TABLES[1] | USER);
    (0..1024).for_each(|i| page(&mem, i << 12, i << 12 | USER));
    page(&mem, 0xFFFF_F000, 0x8_0000 | USER);
    mem.store(IDT + 8 * 14, 8, HANDLER & 0xFFFF | 8 << 16 | 0xEE00 << 32);
    mem.write_bytes(HANDLER, &[0xF4]); // hlt
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    p.use_windows(windows);
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4) = (0x8001_0033, DIRECTORY, 0x600);
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC0F3, selector: 0x2B }; 6];
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xC0FB, selector: 0x23 };
    c.seg[seg::FS].base = 0x10_0000;
    c.cpl = 3;
    (c.idtr.base, c.idtr.limit) = (IDT, 0x7FF);
    (c.rip, c.gpr[4]) = (CODE, 0x2_0000);
    c.refresh();
    p
}

fn run(p: &mut Processor, budget: u64) {
    assert_eq!(reason::BUDGET, p.run(budget, &mut || false).reason);
}

/// What a program and who counts may see.
fn seen(p: &mut Processor) -> (u64, String) {
    (state_hash(&mut p.core), format!("{:?}", p.core.counts))
}

#[test]
fn nothing_but_speed_depends_on_windows() {
    let kinds = [EngineKind::Reference, EngineKind::Dbt, EngineKind::Dbt, EngineKind::Dbt];
    let windows = [Windows::Never, Windows::Never, Windows::Always, Windows::Auto];
    for budget in [7, 1009, 400_000] {
        let mut all: Vec<_> = kinds.into_iter().zip(windows).map(|(k, w)| machine(k, w)).collect();
        for turn in 0..4 {
            for p in &mut all {
                run(p, budget);
            }
            let expected = seen(&mut all[0]);
            for (i, p) in all.iter_mut().enumerate() {
                assert_eq!(expected, seen(p), "budget {budget}, turn {turn}, processor {i}");
            }
            // The last one's change all the time.
            all[3].use_windows([Windows::Always, Windows::Never, Windows::Auto][turn % 3]);
        }
        assert_eq!(0, counter(&all[1], "windows_opened"));
        assert_eq!(1, counter(&all[2], "windows_opened"));
    }
}

#[test]
fn a_program_that_computes_gets_a_window_and_needs_little_else() {
    let mut p = machine(EngineKind::Dbt, Windows::Auto);
    run(&mut p, 100_000);
    assert_eq!(0, counter(&p, "windows_opened"));
    run(&mut p, 2_000_000);
    assert_eq!(1, counter(&p, "windows_opened"));
    let before = ["interpreted", "window_fills"].map(|name| counter(&p, name));
    run(&mut p, 1_000_000);
    let after = ["interpreted", "window_fills"].map(|name| counter(&p, name));
    // (ECX walks through memory: a page each 170 rounds.)
    assert!(after[0] - before[0] < 60 && after[1] - before[1] < 60, "{before:?} {after:?}");
}

/// Bytes for each instruction, block heads and ends in the sum; 4.1 of them are the guest's.
#[test]
fn an_instruction_becomes_few_bytes() {
    let bytes = [Windows::Never, Windows::Always].map(|w| {
        let mut p = machine(EngineKind::Dbt, w);
        run(&mut p, 100_000);
        counter(&p, "emitted_bytes") / counter(&p, "translated_instructions")
    });
    assert!(bytes[0] <= 70 && bytes[1] <= 37, "{bytes:?}");
}

/// Both engines after the same change of a table.
fn after_a_change(gva: u64, entry: u64, invalidates: bool) -> [Processor; 2] {
    [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
        let mut p = machine(engine, Windows::Always);
        run(&mut p, 50_000);
        page(&p.core.mem, gva, entry);
        if invalidates {
            p.core.tlb.invalidate(gva);
        }
        p.run(50_000, &mut || false);
        p
    })
}

#[test]
fn what_the_tlb_loses_the_window_loses() {
    let cases = [
        (0x3_0000, 0x9_0000 | USER, true),  // elsewhere
        (0x3_0000, 0x9_0000 | USER, false), // not yet
        (0x3_0000, 0, true),                // nowhere
        (0x3_0000, 0x3_0000 | 5, true),     // not to be written
        (0x3_1000, 0x3_1000 | 3, true),     // not the program's
        (0xFFFF_F000, 0, true),
        (0x1_F000, 0x9_1000 | USER, true), // the stack
    ];
    for (gva, entry, invalidates) in cases {
        let mut both = after_a_change(gva, entry, invalidates);
        assert_eq!(1, counter(&both[1], "windows_opened"));
        let [reference, dbt] = both.each_mut().map(seen);
        assert_eq!(reference, dbt, "{gva:#x} {entry:#x} {invalidates}");
        for at in [0x3_0000, 0x9_0000, 0x8_0FFC, 0x9_1FF0] {
            let [reference, dbt] = both.each_ref().map(|p| p.core.mem.load(at, 8));
            assert_eq!(reference, dbt, "{gva:#x} {entry:#x} {invalidates}: {at:#x}");
        }
    }
}

/// A page of the window becomes code, which the program then writes over, and its frame's dirty mark is
/// taken.
#[test]
fn who_takes_the_right_to_write_takes_the_windows() {
    let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
        let mut p = machine(engine, Windows::Always);
        // again: inc dword [f + 1]; call f; jmp again; f: mov eax, imm32; ret
        let f = CODE + 0x1010;
        let code = [0xFF, 0x05, 0x11, 0x10, 0x01, 0x00, 0xE8, 0x05, 0, 0, 0, 0xEB, 0xF3, 0x90, 0x90, 0x90];
        p.core.mem.write_bytes(CODE + 0x1000, &code);
        p.core.mem.write_bytes(f, &[0xB8, 0, 0, 0, 0, 0xC3]);
        run(&mut p, 1000); // the window has the page for writing
        p.core.rip = CODE + 0x1000;
        run(&mut p, 5 * 300);
        assert_eq!(300, p.core.gpr[0]);
        p
    });
    let [reference, dbt] = both.each_mut().map(seen);
    assert_eq!(reference, dbt);
    let mut p = machine(EngineKind::Dbt, Windows::Always);
    run(&mut p, 50_000);
    assert!(p.core.mem.take_dirty(0x30, true));
    run(&mut p, 1000);
    assert!(p.core.mem.take_dirty(0x30, true));
}

#[test]
fn another_space_has_another_window() {
    let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
        let mut p = machine(engine, Windows::Always);
        p.core.mem.store(0x5000, 4, 0x6000 | USER);
        p.core.mem.store(0x5000 + 4 * 1023, 4, TABLES[1] | USER);
        (0..1024).for_each(|i| p.core.mem.store(0x6000 + 4 * i, 4, i << 12 | USER));
        p.core.mem.store(0x6000 + 4 * 0x30, 4, 0x9_0000 | USER);
        for turn in 0..20 {
            p.core.cr3 = [DIRECTORY, 0x5000][turn % 2];
            p.core.flush_non_global();
            p.core.refresh();
            run(&mut p, 3000);
        }
        p
    });
    let [reference, dbt] = both.each_mut().map(seen);
    assert_eq!(reference, dbt);
    assert_eq!(20, counter(&both[1], "windows_opened"));
    let [reference, dbt] =
        both.each_ref().map(|p| (p.core.mem.load(0x3_0000, 8), p.core.mem.load(0x9_0000, 8)));
    assert_eq!(reference, dbt);
}

/// Of ten bytes the computer computes two addresses: those of an operand that begins 8 bytes before the end of the
/// address space must not be at its beginning.
#[test]
fn ten_bytes_at_the_end_do_not_go_round() {
    let code = [
        0xBE, 0xF8, 0xFF, 0xFF, 0xFF, // mov esi, -8
        0xFF, 0x06, // inc dword [esi]
        0xFF, 0x46, 0x10, // inc dword [esi + 16]: at 8
        0xD9, 0xE8, // fld1
    ];
    let forms: [&[u8]; 3] = [&[0xDB, 0x3E], &[0xDB, 0x2E], &[0xDF, 0x36]]; // fstp, fld, fbstp tword [esi]
    for form in forms {
        let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
            let mut p = machine(engine, Windows::Always);
            p.core.mem.write_bytes(CODE + 0x1000, &[&code[..], form].concat());
            p.core.rip = CODE + 0x1000;
            p.run(1000, &mut || false);
            p
        });
        let rip = CODE + 0x1000 + code.len() as u64;
        assert_eq!([rip; 2], both.each_ref().map(|p| p.core.rip), "{form:x?}");
        assert_eq!([0; 2], both.each_ref().map(|p| p.core.mem.load(0, 8)), "{form:x?}");
        let [reference, dbt] = both.each_mut().map(seen);
        assert_eq!(reference, dbt, "{form:x?}");
    }
}
