//! System instructions that the translator has a form of its own for: in a guest, each program runs
//! on both engines, its budget chopped in many ways; at every stop and at the exit that ends it both
//! machines are the same.

mod vmx_bed;

use silicon::arch::bits::cr4;
use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::arch::vmcs as f;
use silicon::vmx::controls::{pin, primary, secondary};

use vmx_bed::agreement::*;
use vmx_bed::*;

const STI_BLOCKS: u64 = 1;
const DATA: u64 = 0x9000;

const CLI: u8 = 0xFA;
const STI: u8 = 0xFB;
const SWAPGS: [u8; 3] = [0x0F, 0x01, 0xF8];

#[test]
fn flags_are_changed_and_pushed() {
    // stc; cli; pushfq; pop rax; sti; inc rcx; cld; mov edx, 7FFFFFFFh; add edx, edx; std;
    // pushfq; pop r13; cld; sti; nop; xor r13, rax; cmc; pushfq; pop rbx
    let code = [
        0xF9, CLI, 0x9C, 0x58, STI, 0x48, 0xFF, 0xC1, 0xFC, 0xBA, 0xFF, 0xFF, 0xFF, 0x7F, 0x01, 0xD2, 0xFD,
        0x9C, 0x41, 0x5D, 0xFC, STI, 0x90, 0x49, 0x31, 0xC5, 0xF5, 0x9C, 0x5B,
    ];
    let end = whole("flags", &code, nothing, nothing);
    assert_eq!((0x200, 0x202), (end.of(f::GUEST_RFLAGS) & 0x200, end.gpr[3] & !0xC5 & 0x6FF));
    // A stack that crosses a page, and one that is in none.
    whole("pushf across pages", &[0xBC, 4, 0x80, 0, 0, 0xF9, 0x9C, 0x58], nothing, nothing);
    faults("pushf nowhere", 14, &[0xBC, 4, 0x80, 0, 0x40, 0xF9, 0x9C, 0x58], nothing);
}

#[test]
fn the_stack_pointer_is_popped() {
    // mov rax, rsp; push rax; push 5; pop rcx; pop rsp; mov rdx, rsp
    let code = [0x48, 0x89, 0xE0, 0x50, 0x6A, 0x05, 0x59, 0x5C, 0x48, 0x89, 0xE2];
    let end = whole("pop rsp", &code, nothing, nothing);
    assert_eq!((STACK, STACK), (end.of(f::GUEST_RSP), end.gpr[0]));
}

#[test]
fn bases_are_swapped_read_and_written() {
    let bases = |bed: &mut Bed| {
        let core = bed.core();
        core.cr4 |= 1 << 16;
        core.seg[seg::GS].base = 0x1111_0000;
        core.msr.kernel_gs_base = 0xFFFF_8000_2222_0000;
    };
    // swapgs; rdgsbase rax; swapgs; rdgsbase r13d; swapgs; wrgsbase r13; wrfsbase esi;
    // rdfsbase r14; stc; wrfsbase rax
    let code = [
        0x0F, 0x01, 0xF8, 0xF3, 0x48, 0x0F, 0xAE, 0xC8, 0x0F, 0x01, 0xF8, 0xF3, 0x41, 0x0F, 0xAE, 0xCD, 0x0F,
        0x01, 0xF8, 0xF3, 0x49, 0x0F, 0xAE, 0xDD, 0xF3, 0x0F, 0xAE, 0xD6, 0xF3, 0x49, 0x0F, 0xAE, 0xC6, 0xF9,
        0xF3, 0x48, 0x0F, 0xAE, 0xD0,
    ];
    whole("bases", &code, nothing, |bed| {
        bases(bed);
        bed.core().gpr[6] = 0x1_8765_4321;
    });
    // Not canonical; not enabled (after five rounds, so that the block is hot); not at this level.
    let wrong = [0x48, 0x0F, 0xBA, 0xE8, 0x3E, 0xF3, 0x48, 0x0F, 0xAE, 0xD8]; // bts rax, 62; wrgsbase rax
    faults("not canonical", 13, &wrong, bases);
    // cmp ebp, 2; jne +9; mov rax, cr4; btr eax, 16; mov cr4, rax; rdfsbase rax
    let disabled = [
        0x83, 0xFD, 0x02, 0x75, 0x0A, 0x0F, 0x20, 0xE0, 0x0F, 0xBA, 0xF0, 0x10, 0x0F, 0x22, 0xE0, 0xF3, 0x48,
        0x0F, 0xAE, 0xC0,
    ];
    let end = faults("not enabled", 6, &disabled, bases);
    assert_eq!(2, end.gpr[5]);
    for cpl in [1, 3] {
        faults("swapgs below level 0", 13, &SWAPGS, |bed| level(bed, cpl));
    }
}

#[test]
fn rights_of_keys_are_read() {
    const RDPKRU: [u8; 3] = [0x0F, 0x01, 0xEE];
    let keys = |bed: &mut Bed| {
        let core = bed.core();
        core.cr4 |= cr4::PKE;
        core.pkru = 0x8765_4321;
        core.gpr[..3].copy_from_slice(&[u64::MAX, 0xF << 32, u64::MAX]);
    };
    // stc; rdpkru; sbb ebx, ebx
    let end = whole("rdpkru", &[0xF9, 0x0F, 0x01, 0xEE, 0x19, 0xDB], nothing, keys);
    assert_eq!([0x8765_4321, 0xF << 32, 0, 0xFFFF_FFFF], end.gpr[..4]);
    // xor ecx, ecx; cmp ebp, 2; sete cl; rdpkru (hot by then)
    let hot = [0x31, 0xC9, 0x83, 0xFD, 0x02, 0x0F, 0x94, 0xC1, 0x0F, 0x01, 0xEE];
    let end = faults("rdpkru of another register", 13, &hot, keys);
    assert_eq!(2, end.gpr[5]);
    // cmp ebp, 2; jne +9; mov rax, cr4; btr eax, 22; mov cr4, rax; rdpkru
    let mut disabled =
        vec![0x83, 0xFD, 0x02, 0x75, 0x0A, 0x0F, 0x20, 0xE0, 0x0F, 0xBA, 0xF0, 0x16, 0x0F, 0x22, 0xE0];
    disabled.extend(RDPKRU);
    let end = faults("not enabled", 6, &disabled, keys);
    assert_eq!(2, end.gpr[5]);
}

#[test]
fn selectors_are_stored() {
    // mov eax, ds; mov cx, cs; mov rdx, ss; mov r13, es; mov r14w, gs; mov [9000h], fs
    let code = [
        0x8C, 0xD8, 0x66, 0x8C, 0xC9, 0x48, 0x8C, 0xD2, 0x4D, 0x8C, 0xC5, 0x66, 0x45, 0x8C, 0xEE, 0x8C, 0x24,
        0x25, 0x00, 0x90, 0x00, 0x00, 0x66, 0x8C, 0x04, 0x25, 0xFF, 0x9F, 0x00, 0x00,
    ];
    let end = whole("selectors", &code, nothing, |bed| {
        let core = bed.core();
        core.gpr = [0x7777_6666_5555_4444; 16];
        core.gpr[4] = STACK;
        for (i, s) in core.seg.iter_mut().enumerate().filter(|(i, _)| ![seg::CS, seg::SS].contains(i)) {
            s.selector = 0x100 + i as u16 * 8;
        }
    });
    assert_eq!((0x118, 0x7777_6666_5555_0008, 0x10), (end.gpr[0], end.gpr[1] | 0x7777 << 48, end.gpr[2]));
    assert_eq!((0x100, 0x7777_6666_5555_0128), (end.gpr[13], end.gpr[14]));
}

#[test]
fn bits_lie_far_from_their_operand() {
    // Offsets in RAX, RCX and R13 wander; BT, BTS, BTR, BTC, with LOCK, of 8, 4 and 2 bytes.
    let code = [
        0x48, 0x05, 0x35, 0x12, 0x00, 0x00, // add rax, 1235h
        0x48, 0x2D, 0x77, 0x09, 0x00, 0x00, // sub rax, 977h
        0x49, 0x81, 0xED, 0x91, 0x01, 0x00, 0x00, // sub r13, 191h
        0x48, 0x0F, 0xAB, 0x06, // bts [rsi], rax
        0x10, 0xD2, // adc dl, dl
        0x48, 0x0F, 0xA3, 0x06, // bt [rsi], rax
        0x10, 0xD2, // adc dl, dl
        0x4C, 0x0F, 0xBB, 0x6E, 0x08, // btc [rsi+8], r13
        0x10, 0xD2, // adc dl, dl
        0xF0, 0x4C, 0x0F, 0xB3, 0x2E, // lock btr [rsi], r13
        0xF0, 0x48, 0x0F, 0xBB, 0x04, 0xCE, // lock btc [rsi+rcx*8], rax
        0x10, 0xD2, // adc dl, dl
        0x44, 0x0F, 0xA3, 0x2E, // bt [rsi], r13d
        0x10, 0xD2, // adc dl, dl
        0x0F, 0xAB, 0x46, 0x04, // bts [rsi+4], eax
        0x66, 0x0F, 0xAB, 0x46, 0x04, // bts [rsi+4], ax
        0x64, 0x48, 0x0F, 0xBB, 0x0E, // btc fs:[rsi], rcx
        0x67, 0x0F, 0xBB, 0x06, // btc [esi], eax
        0x67, 0x4C, 0x0F, 0xBB, 0x04, 0x25, 0x00, 0x98, 0, 0, // addr32 btc [9800h], r8: comes round
        0x4D, 0x0F, 0xBB, 0x6D, 0x00, // btc [r13], r13: far outside in the end
    ];
    let start = |bed: &mut Bed| {
        let core = bed.core();
        core.gpr[8] = 8 * 0x1_0000_0010;
        (core.gpr[0], core.gpr[1], core.gpr[6]) = (-7000_i64 as u64, 3, DATA + 0x7FE);
        (core.gpr[13], core.seg[seg::FS].base) = (0x9000, 0x2002);
    };
    whole("far bits", &code, nothing, start);
    faults("bit nowhere", 14, &[0x48, 0x0F, 0xAB, 0x06], |bed| {
        start(bed);
        bed.core().gpr[0] = 1 << 40;
    });
}

/// `sti` with interrupts off before, then `code`.
fn behind_sti(code: &[u8]) -> Vec<u8> {
    [&[CLI, 0x90, STI][..], code].concat()
}

#[test]
fn what_interrupts_the_instruction_behind_sti_sees_the_shadow() {
    // mov rax, [40000000h]; push [there]; ret to an address that is not canonical; ud2
    let nowhere: &[u8] = &[0x48, 0x8B, 0x04, 0x25, 0x00, 0x00, 0x00, 0x40];
    for (name, vector, code) in [
        ("load", 14, nowhere),
        ("push", 14, &[0xFF, 0x34, 0x25, 0x00, 0x00, 0x00, 0x40]),
        ("ret", 13, &[0xC3]),
        ("ud2", 6, &[0x0F, 0x0B]),
        ("div", 0, &[0xF7, 0xF3]),
    ] {
        let end = faults(name, vector, &behind_sti(code), |bed| {
            bed.guest_store(STACK, 0x8000_0000_0000_0000);
            bed.core().gpr[3] = 0;
        });
        assert_eq!(STI_BLOCKS, end.of(f::GUEST_INTERRUPTIBILITY_STATE), "{name}");
        assert_eq!(0x200, end.of(f::GUEST_RFLAGS) & 0x200, "{name}");
        assert_eq!(CODE + 8, end.of(f::GUEST_RIP), "{name}");
    }
    // In the second round the block is known, and a group's check fails behind STI: in round 3
    // RSI moves to where nothing is.
    let code = [
        0x83, 0xFD, 0x03, 0x75, 0x03, 0x48, 0x01, 0xDE, CLI, STI, 0x48, 0x8B, 0x06, 0x48, 0x8B, 0x56, 0x08,
        0x48, 0x8B, 0x4E, 0x10,
    ];
    let end = faults("group", 14, &code, |bed| (bed.core().gpr[6], bed.core().gpr[3]) = (DATA, 0x4000_0000));
    assert_eq!((STI_BLOCKS, 3), (end.of(f::GUEST_INTERRUPTIBILITY_STATE), end.gpr[5]));
    // The same where the group only crosses a page: all goes on.
    whole("group across pages", &code, nothing, |bed| {
        (bed.core().gpr[6], bed.core().gpr[3]) = (DATA, 0xFF4);
    });
    // HLT behind STI, exiting.
    let end = agree(
        "hlt",
        &behind_sti(&[0xF4]),
        |bed| {
            bed.set(PRIMARY, primary::HLT_EXITING);
        },
        nothing,
    );
    assert_eq!((reason::HLT, STI_BLOCKS), (end.exit.reason, end.of(f::GUEST_INTERRUPTIBILITY_STATE)));
}

#[test]
fn the_shadow_ends_with_the_instruction_behind_sti() {
    // In each case the second instruction behind STI faults, without a shadow.
    for (name, code) in [
        ("nop", &[0x90, 0x0F, 0x0B][..]),
        ("jmp", &[0xEB, 0x00, 0x0F, 0x0B]),
        ("jz", &[0x74, 0x00, 0x0F, 0x0B]),
        ("sti", &[STI, 0x0F, 0x0B]),
        ("call", &[0xE8, 0, 0, 0, 0, 0x0F, 0x0B]),
        ("load", &[0x48, 0x8B, 0x04, 0x24, 0x0F, 0x0B]),
        ("ret", &[0xC3, 0x0F, 0x0B]),
        ("jmp rax", &[0xFF, 0xE0, 0x0F, 0x0B]),
        ("pause", &[0xF3, 0x90, 0x0F, 0x0B]),
    ] {
        // Five rounds without harm: cmp ebp, 1; jne to the end.
        let mut program = behind_sti(code);
        let length = program.len() as u8;
        let mut all = vec![0x83, 0xFD, 0x01, 0x75, length];
        all.append(&mut program);
        let end = faults(name, 6, &all, |bed| {
            let target = CODE + 10 + 3 + if name == "jmp rax" { 2 } else { 1 };
            bed.guest_store(STACK, target);
            bed.core().gpr[0] = target;
        });
        assert_eq!(0, end.of(f::GUEST_INTERRUPTIBILITY_STATE), "{name}");
        assert_eq!(0x200, end.of(f::GUEST_RFLAGS) & 0x200, "{name}");
    }
}

#[test]
fn an_interrupt_that_waits_comes_behind_the_instruction_behind_sti() {
    let code = behind_sti(&[0xFF, 0xC0, 0xFF, 0xC3]); // inc eax; inc ebx
    let window = |bed: &mut Bed| {
        bed.set(PRIMARY, primary::INTERRUPT_WINDOW_EXITING);
    };
    let end = agree("window", &code, window, nothing);
    assert_eq!((reason::INTERRUPT_WINDOW, CODE + 10), (end.exit.reason, end.of(f::GUEST_RIP)));
    assert_eq!(0, end.of(f::GUEST_INTERRUPTIBILITY_STATE));
    let waits = |bed: &mut Bed| {
        bed.core().apic.wrmsr(0x1B, 0xFEE0_0C00, 0).unwrap();
        bed.core().apic.wrmsr(0x80F, 0x1FF, 0).unwrap();
        bed.core().apic.raise_vector(0x40, false);
        assert_eq!(Some(0x40), bed.core().apic.pending());
    };
    // Delivered through the guest's IDT: the handler is UD2.
    let handler = |bed: &mut Bed| {
        bed.gate(0x40, 0x100).code_at(0x100, &[0x0F, 0x0B]);
    };
    let end = agree("through the IDT", &code, handler, waits);
    assert_eq!((reason::EXCEPTION_OR_NMI, CODE + 0x100), (end.exit.reason, end.of(f::GUEST_RIP)));
    let exits = |bed: &mut Bed| {
        bed.set(PIN, pin::EXTERNAL_INTERRUPT_EXITING);
    };
    let end = agree("exits", &code, exits, waits);
    assert_eq!(reason::EXTERNAL_INTERRUPT, end.exit.reason);
}

#[test]
fn sti_stands_at_the_end_of_a_page_and_of_a_block() {
    // jmp to CODE + FFEh: cli; sti there, then the next page: inc eax; jmp back.
    for (at, far) in [(0xFFE, &[CLI, STI, 0xFF, 0xC0][..]), (0xFFD, &[CLI, STI, 0xFF, 0xC0])] {
        let jump = |from: u64, to: u64| (to.wrapping_sub(from + 5) as i32).to_le_bytes();
        let code = [&[0xE9][..], &jump(5, at)].concat();
        let end = whole(
            "page",
            &code,
            |bed| {
                let back = at + far.len() as u64;
                bed.code_at(at, &[far, &[0xE9], &jump(back, 10)].concat());
            },
            nothing,
        );
        assert_eq!(0x200, end.of(f::GUEST_RFLAGS) & 0x200);
    }
    // STI as the last of a block's instructions, and the one before.
    for nops in 44..48 {
        let code = [&vec![0x90; nops][..], &[CLI, STI, 0xFF, 0xC0, CLI, STI, STI, 0x90]].concat();
        whole("long block", &code, nothing, nothing);
    }
}

#[test]
fn lower_levels_may_not_change_the_interrupt_flag() {
    for cpl in [1, 3] {
        for code in [CLI, STI] {
            faults("IOPL 0", 13, &[code], |bed| level(bed, cpl));
        }
        let end = whole("IOPL 3", &[CLI, 0x90, STI, 0x90], nothing, |bed| {
            level(bed, cpl);
            bed.core().rflags |= 0x3000;
        });
        assert_eq!(0x200, end.of(f::GUEST_RFLAGS) & 0x200);
    }
}

fn has_rdtscp(bed: &mut Bed) {
    bed.set(SECONDARY, secondary::ENABLE_RDTSCP);
}

#[test]
fn the_time_stamp_counter_counts_to_the_instruction() {
    // rdtsc; mov ebx, eax; nop; rdtscp; sub eax, ebx
    let code = [0x0F, 0x31, 0x89, 0xC3, 0x90, 0x0F, 0x31, 0x29, 0xD8];
    let offset = |bed: &mut Bed| {
        has_rdtscp(bed);
        bed.set(PRIMARY, primary::USE_TSC_OFFSETTING).write(f::TSC_OFFSET, 0x1_2345_6789);
    };
    for (name, vmcs) in [("plain", &(has_rdtscp as fn(&mut Bed)) as &dyn Fn(&mut Bed)), ("offset", &offset)] {
        let end = whole(name, &code, vmcs, nothing);
        assert_eq!(3, end.gpr[0], "{name}");
    }
    // The same with RDTSCP behind, and the processor's number.
    let code_p = [&code[..5], &[0x0F, 0x01, 0xF9, 0x29, 0xD8]].concat();
    let end = whole("rdtscp", &code_p, has_rdtscp, |bed| {
        (bed.core().msr.tsc_aux, bed.core().msr.tsc_adjust) = (7, 1 << 33);
    });
    assert_eq!((3, 7), (end.gpr[0], end.gpr[1]));
    faults("no rdtscp", 6, &code_p, nothing);
    let exits = |bed: &mut Bed| {
        bed.set(PRIMARY, primary::RDTSC_EXITING);
    };
    assert_eq!(reason::RDTSC, agree("exits", &code, exits, nothing).exit.reason);
    let end = faults("TSD", 13, &code, |bed| {
        level(bed, 3);
        bed.core().cr4 |= 4;
    });
    assert_eq!(CODE + 5, end.of(f::GUEST_RIP));
}

#[test]
fn pause_exits_if_it_is_told_to() {
    let exits = |bed: &mut Bed| {
        bed.set(PRIMARY, primary::PAUSE_EXITING);
    };
    assert_eq!(reason::PAUSE, agree("pause", &[0xF3, 0x90], exits, nothing).exit.reason);
    whole("pause", &[0xF3, 0x90], nothing, nothing);
}

#[test]
fn faults_are_handled_and_returned_from() {
    // mov esi, 40000000h, then a load; the handler (CODE + 100h) does `fix`, drops the error code
    // and returns to the load, with RFLAGS.RF set.
    let handler = |fix: &'static [u8]| {
        move |bed: &mut Bed| {
            bed.write(f::EXCEPTION_BITMAP, 0xFFFF_BFFF).gate(14, 0x100);
            bed.code_at(0x100, &[fix, &[0x48, 0x83, 0xC4, 0x08, 0x48, 0xCF]].concat());
            bed.guest_store(PML4 + 0x2008, 0x20_0083); // beyond the EPT
        }
    };
    let open = |bed: &mut Bed| {
        bed.core().rflags |= 0x201;
        bed.core().cr4 |= 0x200;
    };
    let to_data: &[u8] = &[0xBE, 0x00, 0x90, 0, 0]; // mov esi, 9000h
    for (name, load) in [
        ("integer", &[0x48, 0x8B, 0x06][..]),       // mov rax, [rsi]
        ("carry", &[0x11, 0x06]),                   // adc [rsi], eax
        ("vector", &[0x0F, 0x10, 0x06]),            // movups xmm0, [rsi]
        ("push", &[0xFF, 0x36, 0x58]),              // push [rsi]; pop rax
        ("call", &[0xFF, 0x16]),                    // call [rsi], to the instruction behind
        ("sti", &[0xFB, 0x48, 0x8B, 0x06]),         // sti; mov rax, [rsi]
        ("group", &[0x8B, 0x06, 0x8B, 0x4E, 0x08]), // mov eax, [rsi]; mov ecx, [rsi+8]
        ("string", &[0xF3, 0xA6]),                  // repe cmpsb
    ] {
        let code = [&[0xBE, 0, 0, 0, 0x40][..], load].concat();
        let end = whole(name, &code, handler(to_data), |bed| {
            open(bed);
            bed.guest_store(DATA, CODE + 12);
            bed.core().gpr[7] = DATA + 0x100;
            bed.core().gpr[1] = 2;
        });
        assert_eq!(0, end.of(f::GUEST_RFLAGS) & 1 << 16, "{name}");
    }
    // The repeated instruction exits, or faults again: RF is still set.
    let code = [0xBE, 0, 0, 0, 0x40, 0x48, 0x8B, 0x06];
    let end = agree("EPT", &code, handler(&[0xBE, 0x00, 0x00, 0x20, 0]), open);
    assert_eq!((reason::EPT_VIOLATION, 1 << 16), (end.exit.reason, end.of(f::GUEST_RFLAGS) & 1 << 16));
    let end = agree("again", &code, handler(&[0x48, 0x0F, 0xBA, 0xEE, 0x3E]), open); // bts rsi, 62
    assert_eq!((reason::EXCEPTION_OR_NMI, 13), (end.exit.reason, end.exit.intr_info & 0xFF));
    // The handler stands right behind the instruction that faults.
    let end = agree(
        "behind",
        &code,
        |bed| {
            bed.write(f::EXCEPTION_BITMAP, 0xFFFF_BFFF).gate(14, 13);
        },
        open,
    );
    assert_eq!(reason::CPUID, end.exit.reason);
}

#[test]
fn code_of_two_modes_lies_at_one_address() {
    let tables = |bed: &mut Bed| {
        let core = bed.core();
        core.gdtr.base = DATA;
        core.gdtr.limit = 0x1F;
        let descriptors = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF];
        for (i, d) in (0..).zip(descriptors) {
            core.mem.store(GUEST + DATA + 8 * i, 8, d);
        }
        core.gpr[3] = 0;
    };
    let program = |end: &[u8]| {
        // lea rsi, [f]; call rsi; push 18h; lea rax, [narrow]; push rax; retfq
        let mut code = vec![0x48, 0x8D, 0x35, 27, 0, 0, 0, 0xFF, 0xD6, 0x6A, 0x18];
        code.extend([0x48, 0x8D, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xCB]);
        // narrow: call esi; call esi; jmp 8:wide
        code.extend([0xFF, 0xD6, 0xFF, 0xD6, 0xEA]);
        code.extend((CODE as u32 + 5 + 32).to_le_bytes());
        code.extend([8, 0]);
        // wide: jmp behind f
        code.extend([0xEB, 4 + end.len() as u8]);
        // f: inc rbx, or dec eax and inc ebx
        code.extend([0x48, 0xFF, 0xC3]);
        code.extend(end);
        code.push(0xC3);
        code
    };
    // RSP is balanced: every round ends as it began.
    let end = whole("modes", &program(&[]), nothing, tables);
    assert_eq!(18, end.gpr[3]);
    // mov [9800h], ebx with its address behind RIP in 64-bit code: not the same in 32-bit code
    let store = [0x89, 0x1D, 0, 0x98, 0, 0];
    assert_eq!(18, whole("modes and memory", &program(&store), nothing, tables).gpr[3]);
}

#[test]
fn overwritten_code_is_found_again_by_jumps_of_both_kinds() {
    let code = [
        0x40, 0x88, 0x2D, 0x0E, 0x00, 0x00, 0x00, // mov [there + 1], bpl
        0x40, 0xF6, 0xC5, 0x01, // test bpl, 1
        0x74, 0x02, // jz +2
        0xFF, 0xE0, // jmp rax
        0xEB, 0x03, // jmp there
        0x90, 0x90, 0x90, // (not executed)
        0xB3, 0x00, // there: mov bl, 0
        0x01, 0xDA, // add edx, ebx
    ];
    let end = whole("overwritten", &code, nothing, |bed| {
        let core = bed.core();
        (core.gpr[0], core.gpr[2], core.gpr[3]) = (CODE + 25, 0, 0);
    });
    assert_eq!(6 + 5 + 4 + 3 + 2 + 1, end.gpr[2]);
}
