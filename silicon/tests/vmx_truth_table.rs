//! The truth table of what exits, in code that a guest executes, on both engines: with its control
//! bit 0 an instruction or event takes no exit, with 1 exactly one, with the manual's basic reason
//! (SDM 3C, "Instructions That Cause VM Exits Conditionally", "Other Causes of VM Exits").

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{pin, primary as p, secondary as s};
use vmx_bed::*;

/// The one bit of the VMCS, or of a bitmap that it names, that decides.
#[derive(Clone, Copy, Debug)]
enum Bit {
    Control(u32, u32),
    Exception(u64),
    Port(u64),
    MsrRead(u32),
    MsrWrite(u32),
    /// Of the guest/host mask.
    Cr(u8, u32),
}

/// What waits for the guest at its entry.
#[derive(Clone, Copy, PartialEq)]
enum Waiting {
    Nothing,
    Nmi,
}

struct Row {
    name: String,
    bit: Bit,
    reason: u32,
    code: Vec<u8>,
    waiting: Waiting,
}

const DATA: u32 = 0x3_0000;
const HANDLER: u64 = 0x800;
const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];
/// Selectors beside those of the bed: a segment that is not present, a task-state segment.
const ABSENT: u8 = 0x18;
const TASK: u8 = 0x30;

fn row(name: impl Into<String>, bit: Bit, reason: u32, code: &[u8]) -> Row {
    Row { name: name.into(), bit, reason, code: code.to_vec(), waiting: Waiting::Nothing }
}

/// `mov reg,imm32` before an instruction: 0 EAX, 1 ECX, 2 EDX, 7 EDI.
fn with(reg: u8, value: u32, code: &[u8]) -> Vec<u8> {
    [&[0xB8 + reg][..], &value.to_le_bytes(), code].concat()
}

fn of_primary_controls() -> Vec<Row> {
    let one = |name: &str, bit, why, code: &[u8]| row(name, Bit::Control(PRIMARY, bit), why, code);
    vec![
        one("hlt", p::HLT_EXITING, reason::HLT, &[0xF4]),
        one("invlpg", p::INVLPG_EXITING, reason::INVLPG, &[0x0F, 0x01, 0x3F]),
        one("invpcid", p::INVLPG_EXITING, reason::INVPCID, &with(1, 2, &[0x66, 0x0F, 0x38, 0x82, 0x0F])),
        one("rdpmc", p::RDPMC_EXITING, reason::RDPMC, &with(1, 0, &[0x0F, 0x33])),
        one("rdtsc", p::RDTSC_EXITING, reason::RDTSC, &[0x0F, 0x31]),
        one("rdtscp", p::RDTSC_EXITING, reason::RDTSCP, &[0x0F, 0x01, 0xF9]),
        one("mov r,cr3", p::CR3_STORE_EXITING, reason::CR_ACCESS, &[0x0F, 0x20, 0xD8]),
        one("mov cr3,r", p::CR3_LOAD_EXITING, reason::CR_ACCESS, &[0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8]),
        one("mov r,cr8", p::CR8_STORE_EXITING, reason::CR_ACCESS, &[0x44, 0x0F, 0x20, 0xC0]),
        one("mov cr8,r", p::CR8_LOAD_EXITING, reason::CR_ACCESS, &with(0, 3, &[0x44, 0x0F, 0x22, 0xC0])),
        one("pause", p::PAUSE_EXITING, reason::PAUSE, &[0xF3, 0x90]),
        one("mtf", p::MONITOR_TRAP_FLAG, reason::MTF, &[0x90]),
        one("interrupt window", p::INTERRUPT_WINDOW_EXITING, reason::INTERRUPT_WINDOW, &[0xFB, 0x90, 0x90]),
        one("nmi window", p::NMI_WINDOW_EXITING, reason::NMI_WINDOW, &[0x90]),
    ]
}

fn of_debug_registers() -> Vec<Row> {
    let bit = Bit::Control(PRIMARY, p::MOV_DR_EXITING);
    [0_u8, 1, 2, 3, 6, 7]
        .into_iter()
        .flat_map(|dr| {
            let modrm = 0xC0 | dr << 3;
            let write = with(0, if dr < 4 { 0 } else { 0x400 }, &[0x0F, 0x23, modrm]);
            [
                row(format!("mov r,dr{dr}"), bit, reason::MOV_DR, &[0x0F, 0x21, modrm]),
                row(format!("mov dr{dr},r"), bit, reason::MOV_DR, &write),
            ]
        })
        .collect()
}

fn of_ports() -> Vec<Row> {
    let bit = Bit::Control(PRIMARY, p::UNCONDITIONAL_IO_EXITING);
    let forms: [(&str, &[u8]); 20] = [
        ("in al,imm", &[0xE4, 0x80]),
        ("in ax,imm", &[0x66, 0xE5, 0x80]),
        ("in eax,imm", &[0xE5, 0x80]),
        ("in al,dx", &[0xEC]),
        ("in ax,dx", &[0x66, 0xED]),
        ("in eax,dx", &[0xED]),
        ("out imm,al", &[0xE6, 0x80]),
        ("out imm,ax", &[0x66, 0xE7, 0x80]),
        ("out imm,eax", &[0xE7, 0x80]),
        ("out dx,al", &[0xEE]),
        ("out dx,ax", &[0x66, 0xEF]),
        ("out dx,eax", &[0xEF]),
        ("insb", &[0x6C]),
        ("insw", &[0x66, 0x6D]),
        ("insd", &[0x6D]),
        ("outsb", &[0x6E]),
        ("outsw", &[0x66, 0x6F]),
        ("outsd", &[0x6F]),
        ("rep insb", &[0xB1, 2, 0xF3, 0x6C]),
        ("rep outsb", &[0xB1, 2, 0xF3, 0x6E]),
    ];
    let plain = forms.iter().map(|(name, code)| row(*name, bit, reason::IO, &with(2, 0x3F8, code)));
    let marked = [0x00, 0x3F8, 0x7FFF, 0x8000, 0xCF8, 0xFFFF].into_iter().flat_map(|port: u32| {
        [("in", 0xEC_u8), ("out", 0xEE)].map(|(name, opcode)| {
            let code = with(2, port, &[opcode]);
            row(format!("{name} {port:#x}, by the bitmap"), Bit::Port(port.into()), reason::IO, &code)
        })
    });
    plain.chain(marked).collect()
}

fn of_secondary_controls() -> Vec<Row> {
    let table = Bit::Control(SECONDARY, s::DESCRIPTOR_TABLE_EXITING);
    let one = |name: &str, bit, why, code: &[u8]| row(name, Bit::Control(SECONDARY, bit), why, code);
    let zero = |code: &[u8]| with(0, 0, code);
    vec![
        one("wbinvd", s::WBINVD_EXITING, reason::WBINVD, &[0x0F, 0x09]),
        one("rdrand ax", s::RDRAND_EXITING, reason::RDRAND, &[0x66, 0x0F, 0xC7, 0xF0]),
        one("rdrand eax", s::RDRAND_EXITING, reason::RDRAND, &[0x0F, 0xC7, 0xF0]),
        one("rdrand rax", s::RDRAND_EXITING, reason::RDRAND, &[0x48, 0x0F, 0xC7, 0xF0]),
        one("rdseed ax", s::RDSEED_EXITING, reason::RDSEED, &[0x66, 0x0F, 0xC7, 0xF8]),
        one("rdseed eax", s::RDSEED_EXITING, reason::RDSEED, &[0x0F, 0xC7, 0xF8]),
        one("rdseed rax", s::RDSEED_EXITING, reason::RDSEED, &[0x48, 0x0F, 0xC7, 0xF8]),
        row("sgdt", table, reason::GDTR_IDTR, &[0x0F, 0x01, 0x07]),
        row("sidt", table, reason::GDTR_IDTR, &[0x0F, 0x01, 0x0F]),
        row("lgdt", table, reason::GDTR_IDTR, &[0x0F, 0x01, 0x17]),
        row("lidt", table, reason::GDTR_IDTR, &[0x0F, 0x01, 0x1F]),
        row("sldt m", table, reason::LDTR_TR, &[0x0F, 0x00, 0x07]),
        row("sldt r", table, reason::LDTR_TR, &[0x0F, 0x00, 0xC0]),
        row("str m", table, reason::LDTR_TR, &[0x0F, 0x00, 0x0F]),
        row("str r", table, reason::LDTR_TR, &[0x0F, 0x00, 0xC8]),
        row("lldt", table, reason::LDTR_TR, &zero(&[0x0F, 0x00, 0xD0])),
        row("ltr", table, reason::LDTR_TR, &with(0, TASK.into(), &[0x0F, 0x00, 0xD8])),
    ]
}

fn of_control_registers() -> Vec<Row> {
    let why = reason::CR_ACCESS;
    // mov rax,crN; btc rax,bit; mov crN,rax
    let change = |cr: u8, bit: u32| {
        let modrm = 0xC0 | cr << 3;
        let code = [0x0F, 0x20, modrm, 0x48, 0x0F, 0xBA, 0xF8, bit as u8, 0x0F, 0x22, modrm];
        row(format!("a change of CR{cr}, bit {bit}"), Bit::Cr(cr, bit), why, &code)
    };
    // smsw ax; btc ax,bit; lmsw ax
    let lmsw = |bit: u32| {
        let code = [0x66, 0x0F, 0x01, 0xE0, 0x66, 0x0F, 0xBA, 0xF8, bit as u8, 0x0F, 0x01, 0xF0];
        row(format!("a change by LMSW, bit {bit}"), Bit::Cr(0, bit), why, &code)
    };
    let cr0 = [1, 2, 3, 16, 18, 30].map(|bit| change(0, bit));
    let cr4 = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 16, 17, 18, 21, 22].map(|bit| change(4, bit));
    cr0.into_iter().chain(cr4).chain([1, 2, 3].map(lmsw)).collect()
}

fn of_msrs() -> Vec<Row> {
    let held = [
        0x10,
        0x174,
        0x175,
        0x176,
        0x277,
        0xC000_0080,
        0xC000_0081,
        0xC000_0082,
        0xC000_0083,
        0xC000_0084,
        0xC000_0100,
        0xC000_0101,
        0xC000_0102,
        0xC000_0103,
    ];
    held.into_iter()
        .flat_map(|index: u32| {
            let read = with(1, index, &[0x0F, 0x32]);
            let write = with(1, index, &[0x0F, 0x32, 0x0F, 0x30]);
            [
                row(format!("rdmsr {index:#x}"), Bit::MsrRead(index), reason::RDMSR, &read),
                row(format!("wrmsr {index:#x}"), Bit::MsrWrite(index), reason::WRMSR, &write),
            ]
        })
        .collect()
}

fn of_exceptions() -> Vec<Row> {
    let codes: [(u64, &[u8]); 10] = [
        (0, &[0x31, 0xC9, 0xF7, 0xF1]), // xor ecx,ecx; div ecx
        (1, &[0xF1]),                   // int1
        (3, &[0xCC]),                   // int3
        (6, &[0x0F, 0x0B]),             // ud2
        (7, &[0x0F, 0x20, 0xC0, 0x48, 0x0F, 0xBA, 0xE8, 0x03, 0x0F, 0x22, 0xC0, 0xD9, 0xD0]), // TS; fnop
        (11, &[0xB0, ABSENT, 0x8E, 0xD8]), // mov al,ABSENT; mov ds,ax
        (12, &[0x48, 0xB9, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x48, 0x89, 0xCD, 0x48, 0x8B, 0x45, 0x00]), // [rbp]
        (13, &[0x66, 0xB8, 0x00, 0x10, 0x8E, 0xD8]), // mov ax,1000h; mov ds,ax
        (14, &[0x8B, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00]), // mov eax,[400000h]
        // fninit; push 340h; fldcw [rsp]; fld1; fldz; fdivp; fwait
        (
            16,
            &[0xDB, 0xE3, 0x68, 0x40, 0x03, 0, 0, 0xD9, 0x2C, 0x24, 0xD9, 0xE8, 0xD9, 0xEE, 0xDE, 0xF9, 0x9B],
        ),
    ];
    let one = |(vector, code): (u64, &[u8])| {
        row(format!("exception {vector}"), Bit::Exception(vector), reason::EXCEPTION_OR_NMI, code)
    };
    codes.into_iter().map(one).collect()
}

fn of_pins() -> Vec<Row> {
    let timer = Bit::Control(PIN, pin::ACTIVATE_PREEMPTION_TIMER);
    let nmi = Bit::Control(PIN, pin::NMI_EXITING);
    vec![
        row("the preemption timer", timer, reason::PREEMPTION_TIMER, &[0x90]),
        Row { waiting: Waiting::Nmi, ..row("an nmi", nmi, reason::EXCEPTION_OR_NMI, &[0x90]) },
    ]
}

fn table() -> Vec<Row> {
    [
        of_primary_controls(),
        of_debug_registers(),
        of_ports(),
        of_secondary_controls(),
        of_control_registers(),
        of_msrs(),
        of_exceptions(),
        of_pins(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A guest that executes the row's code, then VMCALL; what exceptions do comes to VMCALL as well.
/// No control bit is set but those that the row needs whatever its own bit says.
fn bed(row: &Row, engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    let setup = with(7, DATA, &[0x89, 0xFE]); // mov edi,DATA; mov esi,edi
    bed.code(&[&setup, &row.code[..], &VMCALL].concat()).code_at(HANDLER, &VMCALL);
    for vector in 0..32 {
        bed.gate(vector, HANDLER);
    }
    bed.guest_store(GDT + u64::from(ABSENT), 0x00CF_1300_0000_FFFF);
    bed.guest_store(GDT + u64::from(TASK), 0x0000_8900_0000_0067 | TSS << 16);
    bed.write(f::EXCEPTION_BITMAP, 0);
    let by_bitmap = match row.bit {
        Bit::Port(_) => p::USE_MSR_BITMAPS | p::USE_IO_BITMAPS,
        _ => p::USE_MSR_BITMAPS,
    };
    bed.set(PRIMARY, by_bitmap).set(SECONDARY, s::ENABLE_RDTSCP | s::ENABLE_INVPCID);
    if row.reason == reason::NMI_WINDOW {
        bed.set(PIN, pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    }
    bed.core().nmi_pending = row.waiting == Waiting::Nmi;
    bed
}

/// Give the row's bit a value.
fn set(bed: &mut Bed, bit: Bit, on: bool) {
    let mut mark = |at: u64, n: u64| {
        let old = bed.core().mem.load(at, 1);
        let new = if on { old | 1 << n } else { old & !(1 << n) };
        bed.core().mem.store(at, 1, new);
    };
    match bit {
        Bit::Port(port) if port < 0x8000 => mark(IO_BITMAP_A + port / 8, port % 8),
        Bit::Port(port) => mark(IO_BITMAP_B + (port - 0x8000) / 8, port % 8),
        Bit::MsrRead(index) => mark(MSR_BITMAPS + of_msr(index) / 8, of_msr(index) % 8),
        Bit::MsrWrite(index) => mark(MSR_BITMAPS + 2048 + of_msr(index) / 8, of_msr(index) % 8),
        Bit::Control(word, control) if on => _ = bed.set(word, control),
        Bit::Control(word, control) => _ = bed.clear(word, control),
        Bit::Exception(vector) => _ = bed.write(f::EXCEPTION_BITMAP, u64::from(on) << vector),
        Bit::Cr(cr, n) => {
            let (mask, shadow, real) = match cr {
                0 => (f::CR0_GUEST_HOST_MASK, f::CR0_READ_SHADOW, f::GUEST_CR0),
                _ => (f::CR4_GUEST_HOST_MASK, f::CR4_READ_SHADOW, f::GUEST_CR4),
            };
            let value = bed.read(real);
            bed.write(shadow, value).write(mask, u64::from(on) << n);
        }
    }
}

/// The bit of an MSR in the read half of the bitmaps.
fn of_msr(index: u32) -> u64 {
    u64::from(index & 0x1FFF) + if index >= 0xC000_0000 { 8192 } else { 0 }
}

fn exits(bed: &mut Bed, why: u32) -> u64 {
    bed.core().counts.exits[why as usize]
}

/// HLT waits, and a port is the machine's own: the guest does not come to its VMCALL.
fn ends_elsewhere(row: &Row) -> bool {
    matches!(row.reason, reason::HLT | reason::IO)
}

#[test]
fn there_are_at_least_a_hundred_rows_and_each_is_another() {
    let names: std::collections::BTreeSet<_> = table().into_iter().map(|row| row.name).collect();
    assert_eq!(table().len(), names.len());
    assert!(names.len() >= 100, "{}", names.len());
}

#[test]
fn a_bit_that_is_0_gives_no_exit() {
    for (row, engine) in each() {
        let mut bed = bed(&row, engine);
        set(&mut bed, row.bit, false);
        let exit = bed.launch();
        assert_eq!(0, exits(&mut bed, row.reason), "{} on {engine:?}", row.name);
        if !ends_elsewhere(&row) {
            assert_eq!(reason::VMCALL, exit.reason, "{} on {engine:?}", row.name);
        }
    }
}

#[test]
fn a_bit_that_is_1_gives_exactly_one_exit_with_the_manuals_reason() {
    for (row, engine) in each() {
        let mut bed = bed(&row, engine);
        set(&mut bed, row.bit, true);
        let exit = bed.launch();
        assert_eq!(row.reason, exit.reason, "{} on {engine:?}", row.name);
        assert_eq!(u64::from(row.reason), bed.read(f::EXIT_REASON), "{}", row.name);
        // Who has seen to it goes on: behind an instruction, or with the event done.
        match row.bit {
            Bit::Exception(vector) => {
                assert_eq!(vector, u64::from(exit.intr_info & 0xFF), "{}", row.name);
                bed.write(f::GUEST_RIP, CODE + HANDLER);
            }
            Bit::Control(PIN, _) => set(&mut bed, row.bit, false),
            _ if matches!(row.reason, reason::MTF | reason::INTERRUPT_WINDOW | reason::NMI_WINDOW) => {
                set(&mut bed, row.bit, false);
            }
            _ => {
                let after = bed.read(f::GUEST_RIP) + u64::from(exit.length);
                bed.write(f::GUEST_RIP, after);
            }
        }
        let end = bed.resume();
        assert_eq!(reason::VMCALL, end.reason, "{} on {engine:?}", row.name);
        assert_eq!(1, exits(&mut bed, row.reason), "{} on {engine:?}", row.name);
    }
}

#[test]
fn another_rows_bit_gives_no_exit() {
    let rows = table();
    let mut wrong = Vec::new();
    for (n, row) in rows.iter().enumerate() {
        // Three others, far away in the table: they decide about something else.
        for other in [37, 61, 83].map(|far| &rows[(n + far) % rows.len()]) {
            let is_same = format!("{:?}", other.bit) == format!("{:?}", row.bit);
            let in_the_way =
                matches!(other.reason, reason::MTF | reason::PREEMPTION_TIMER | reason::NMI_WINDOW)
                    || matches!((other.bit, row.waiting), (Bit::Control(PIN, _), Waiting::Nmi));
            if is_same || in_the_way || other.reason == row.reason {
                continue;
            }
            let mut bed = bed(row, EngineKind::Reference);
            set(&mut bed, row.bit, false);
            set(&mut bed, other.bit, true);
            bed.launch();
            if exits(&mut bed, row.reason) != 0 {
                wrong.push(format!("{} with the bit of {}", row.name, other.name));
            }
        }
    }
    assert_eq!(Vec::<String>::new(), wrong);
}

fn each() -> impl Iterator<Item = (Row, EngineKind)> {
    [EngineKind::Reference, EngineKind::Dbt]
        .into_iter()
        .flat_map(|engine| table().into_iter().map(move |row| (row, engine)))
}
