//! SYSCALL and SYSRET in translated code, with all that makes them be interpreted after all.

mod counters;
mod vmx_bed;

use counters::counter;
use silicon::arch::bits::{cr0, cr4, rflags};
use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::primary;
use silicon::vmx::instructions as vmx;
use vmx_bed::agreement::*;
use vmx_bed::*;

const CLI: u8 = 0xFA;
const STI: u8 = 0xFB;
const SYSRET: [u8; 3] = [0x48, 0x0F, 0x07];

/// SYSCALL goes to `CODE + 0x200`; the program runs at level 3.
fn calls(bed: &mut Bed) {
    level(bed, 3);
    let core = bed.core();
    core.efer |= 1;
    (core.msr.star, core.msr.lstar) = (0x0010_0008 << 32, CODE + 0x200);
    (core.msr.fmask, core.msr.kernel_gs_base) = (0x4_7700, 0x1234_0000);
    core.rflags |= 0x200;
}

#[test]
fn system_calls_and_returns() {
    // swapgs; mov [gs:..]… : cli; sti; nop; cli; swapgs; sysretq
    let kernel: &[u8] =
        &[0x0F, 0x01, 0xF8, CLI, STI, 0x90, 0xFF, 0xC0, CLI, 0x0F, 0x01, 0xF8, 0x48, 0x0F, 0x07];
    let put = |code: &'static [u8]| {
        move |bed: &mut Bed| {
            bed.code_at(0x200, code);
        }
    };
    let syscall = [0xF9, 0x0F, 0x05, 0x10, 0xD2]; // stc; syscall; adc dl, dl
    let end = whole("syscall", &syscall, put(kernel), calls);
    assert_eq!((6, 0x3F), (end.gpr[0], end.gpr[2] & 0xFF));
    assert_eq!(0x200, end.of(f::GUEST_RFLAGS) & 0x200);
    // A return to where nothing can be; without SYSCALL; at level 3.
    let end = agree("sysret", &syscall, put(&[0x48, 0x0F, 0xBA, 0xE9, 0x3E, 0x48, 0x0F, 0x07]), calls);
    assert_eq!((reason::EXCEPTION_OR_NMI, 13), (end.exit.reason, end.exit.intr_info & 0xFF));
    assert_eq!(CODE + 0x205, end.of(f::GUEST_RIP));
    faults("off", 6, &syscall, |bed| level(bed, 3));
    faults("sysret at level 3", 13, &[0x48, 0x0F, 0x07], calls);
    // A return to 32-bit code, which is not translated here, and faults at once.
    agree("sysretl", &syscall, put(&[0x0F, 0x07]), calls);
}

/// Handlers of system calls that change what the program finds, with what it takes to see it.
const FMASKS: [u64; 4] = [0x4_7700, 0x25_7FD5, 0x4_0000, 0];

/// The handler, and SYSRET behind it.
fn handler(code: &[u8]) -> impl Fn(&mut Bed) {
    let all = [code, &SYSRET].concat();
    move |bed: &mut Bed| {
        bed.code_at(0x200, &all);
    }
}

#[test]
fn every_flag_goes_through_the_mask_and_comes_back() {
    // pushfq; pop rbx; add r9, rbx; add r10, r11; xor r11, OF | SF | ZF | AF | PF | CF
    let kernel = [0x9C, 0x5B, 0x49, 0x01, 0xD9, 0x4D, 0x01, 0xDA, 0x49, 0x81, 0xF3, 0xD5, 0x08, 0, 0];
    for (name, program) in [
        ("recorded", &[0xF9][..]),                                    // stc
        ("made", &[0x48, 0x83, 0xC2, 0xFF]),                          // add rdx, -1
        ("overflow", &[0xBA, 0xFF, 0xFF, 0xFF, 0x7F, 0x83, 0xC2, 1]), // mov edx, max; add edx, 1
        ("direction", &[0xFD]),                                       // std
        ("of RCX", &[0x48, 0x39, 0xD9]),                              // cmp rcx, rbx
        ("of R11", &[0x49, 0x83, 0xEB, 1]),                           // sub r11, 1
    ] {
        // …; syscall; pushfq; pop r8; add r12, r8; cld
        let code = [program, &[0x0F, 0x05, 0x9C, 0x41, 0x58, 0x4D, 0x01, 0xC4, 0xFC]].concat();
        for fmask in FMASKS {
            let end = whole(&format!("{name}, mask {fmask:x}"), &code, handler(&kernel), |bed| {
                calls(bed);
                bed.core().msr.fmask = fmask;
            });
            assert_eq!(CODE + 5 + program.len() as u64 + 2, end.gpr[1], "{name}");
        }
    }
}

#[test]
fn segments_are_what_star_says() {
    for star in [0x0010_0008 << 32, 0x0013_000B << 32, 0xFFF8_FFFC << 32] {
        whole("star", &[0x0F, 0x05], handler(&[0x8C, 0xC8, 0x8C, 0xD3]), |bed| {
            // mov eax, cs; mov ebx, ss
            calls(bed);
            bed.core().msr.star = star;
        });
    }
}

#[test]
fn interrupts_come_when_a_return_lets_them() {
    let end = agree(
        "window",
        &[0x0F, 0x05, 0x90, 0x90],
        |bed| {
            bed.set(PRIMARY, primary::INTERRUPT_WINDOW_EXITING);
            handler(&[0x90, 0x90])(bed);
        },
        |bed| {
            calls(bed);
            level(bed, 0);
            bed.core().rflags &= !rflags::IF;
            // (It begins in the handler.)
            (bed.core().rip, bed.core().gpr[1], bed.core().gpr[11]) = (CODE + 0x200, CODE + 7, 0x202);
        },
    );
    assert_eq!((reason::INTERRUPT_WINDOW, CODE + 7), (end.exit.reason, end.of(f::GUEST_RIP)));
    // A handler that stands behind STI; one that returns with interrupts off.
    whole("sti", &[0x0F, 0x05], handler(&[STI]), calls);
    let end = whole("off", &[0x0F, 0x05], handler(&[0x49, 0x81, 0xE3, 0xFF, 0xFD, 0xFF, 0xFF]), calls);
    assert_eq!(0, end.of(f::GUEST_RFLAGS) & rflags::IF);
    let end = whole("on", &[0x0F, 0x05], handler(&[CLI, 0x49, 0x81, 0xCB, 0, 2, 0, 0]), |bed| {
        calls(bed);
        bed.core().rflags &= !rflags::IF;
    });
    assert_eq!(rflags::IF, end.of(f::GUEST_RFLAGS) & rflags::IF);
}

#[test]
fn a_return_to_a_program_that_is_watched() {
    let set = |bit: u8| [0x49, 0x0F, 0xBA, 0xEB, bit]; // bts r11, bit
    let end = agree("TF", &[0x0F, 0x05, 0x90], handler(&set(8)), calls);
    assert_eq!((reason::EXCEPTION_OR_NMI, 1), (end.exit.reason, end.exit.intr_info & 0xFF));
    // mov [rsp - 7], rax
    let end = agree("AC", &[0x0F, 0x05, 0x48, 0x89, 0x44, 0x24, 0xF9], handler(&set(18)), |bed| {
        calls(bed);
        bed.core().cr0 |= cr0::AM;
        bed.core().gpr[4] &= !7;
    });
    assert_eq!((reason::EXCEPTION_OR_NMI, 17), (end.exit.reason, end.exit.intr_info & 0xFF));
}

#[test]
fn supervisor_accesses_to_user_pages_follow_the_mask() {
    // pushfq; bts qword [rsp], 18; popfq; syscall: mov [rsp - 8], rax
    let code = [0x9C, 0x48, 0x0F, 0xBA, 0x2C, 0x24, 18, 0x9D, 0x0F, 0x05];
    let kernel = [0x48, 0x89, 0x44, 0x24, 0xF8];
    let with = |fmask: u64| {
        move |bed: &mut Bed| {
            calls(bed);
            bed.core().msr.fmask = fmask;
            bed.core().cr4 |= cr4::SMAP;
        }
    };
    whole("lifted", &code, handler(&kernel), with(0));
    let end = agree("armed", &code, handler(&kernel), with(rflags::AC));
    assert_eq!((reason::EXCEPTION_OR_NMI, 14), (end.exit.reason, end.exit.intr_info & 0xFF));
}

#[test]
fn the_other_side_was_translated_for_other_rules() {
    // rdtsc; syscall: the handler, at its third call, makes RDTSC privileged.
    let count = [0xFF, 0xC6, 0x83, 0xFE, 3, 0x75, 9]; // inc esi; cmp esi, 3; jne
    let tsd = [0x0F, 0x20, 0xE0, 0x83, 0xC8, 4, 0x0F, 0x22, 0xE0]; // mov rax, cr4; or eax, 4; mov cr4, rax
    let kernel = [&count[..], &tsd].concat();
    let end = agree("TSD", &[0x0F, 0x31, 0x0F, 0x05], handler(&kernel), |bed| {
        calls(bed);
        bed.core().gpr[6] = 0;
    });
    assert_eq!((reason::EXCEPTION_OR_NMI, 13, 3), (end.exit.reason, end.exit.intr_info & 0xFF, end.gpr[6]));
    // x87 and SSE go away: clts' counterpart, mov cr0 with TS.
    let ts = [0x0F, 0x20, 0xC0, 0x83, 0xC8, 8, 0x0F, 0x22, 0xC0];
    let kernel = [&count[..], &ts].concat();
    let end = agree("TS", &[0x66, 0x0F, 0xEF, 0xC0, 0x0F, 0x05], handler(&kernel), |bed| {
        // pxor xmm0, xmm0
        calls(bed);
        bed.core().cr4 |= cr4::OSFXSR;
        bed.core().gpr[6] = 0;
    });
    assert_eq!((reason::EXCEPTION_OR_NMI, 7, 3), (end.exit.reason, end.exit.intr_info & 0xFF, end.gpr[6]));
}

#[test]
fn addresses_that_are_none() {
    agree("lstar", &[0x0F, 0x05], nothing, |bed| {
        calls(bed);
        bed.core().msr.lstar = 1 << 62;
    });
    faults("sysret without SCE", 6, &SYSRET, nothing);
}

#[test]
fn what_counts_at_one_level_alone_counts_on() {
    let write = |msr: u32, eax: u32, edx: u32| {
        let mut code = vec![0xB9];
        for (opcode, v) in [(0xB8, msr), (0xBA, eax), (0x0F, edx)] {
            code.extend(v.to_le_bytes());
            code.push(opcode);
        }
        code.push(0x30); // mov ecx; mov eax; mov edx; wrmsr
        code
    };
    let ends = [1_u32, 2, 3].map(|levels| {
        // mov r15, rcx; …; mov ecx, 4000_0000h; rdpmc; mov r8, rax; mov rcx, r15
        let kernel = [
            &[0x49, 0x89, 0xCF][..],
            &write(0x38D, levels, 0),
            &write(0x38F, 0, 1),
            &[0xB9, 0, 0, 0, 0x40, 0x0F, 0x33, 0x49, 0x89, 0xC0, 0x4C, 0x89, 0xF9],
        ]
        .concat();
        let bitmaps = |bed: &mut Bed| {
            bed.set(PRIMARY, primary::USE_MSR_BITMAPS);
            bed.write(f::MSR_BITMAPS, MSR_BITMAPS);
            handler(&kernel)(bed);
        };
        whole("pmu", &[0x90, 0x90, 0x0F, 0x05], bitmaps, calls).gpr[8]
    });
    assert!(ends[0] > 0 && ends[1] > 0 && ends[0] + ends[1] == ends[2], "{ends:?}");
}

/// A thousand system calls, none of which is interpreted or looked up.
#[test]
fn nobody_leaves_generated_code_for_a_system_call() {
    let mut bed = Bed::on(EngineKind::Dbt);
    // mov ebp, 1000; l: syscall; dec ebp; jnz l; cpuid
    bed.code(&[0xBD, 0xE8, 3, 0, 0, 0x0F, 0x05, 0xFF, 0xCD, 0x75, 0xFA, 0x0F, 0xA2]);
    handler(&[0xFF, 0xC0])(&mut bed); // inc eax
    vmx::vmlaunch(bed.core()).unwrap();
    calls(&mut bed);
    bed.core().refresh();
    let eax = bed.core().gpr[0];
    assert_eq!(reason::CPUID, bed.processor.run(1 << 20, &mut || false).reason);
    assert_eq!(1000, bed.core().gpr[0] - eax);
    for name in ["interpreted", "lookups", "entries"] {
        assert!(counter(&bed.processor, name) < 30, "{name}: {}", counter(&bed.processor, name));
    }
}
