//! Real instructions in a guest against their control bits, and VMX instructions as code in the
//! machine executes them.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{primary, secondary};
use vmx_bed::*;

#[test]
fn an_instruction_exits_exactly_if_its_control_says_so() {
    use primary as p;
    use secondary as s;
    let rows: &[(&[u8], u32, u32, u32, u64)] = &[
        (&[0xF4], PRIMARY, p::HLT_EXITING, reason::HLT, 0),
        (&[0x0F, 0x01, 0x7B, 0x10], PRIMARY, p::INVLPG_EXITING, reason::INVLPG, 0x5010), // [rbx+16]
        (&[0x0F, 0x33], PRIMARY, p::RDPMC_EXITING, reason::RDPMC, 0),
        (&[0x0F, 0x31], PRIMARY, p::RDTSC_EXITING, reason::RDTSC, 0),
        (&[0x0F, 0x01, 0xF9], PRIMARY, p::RDTSC_EXITING, reason::RDTSCP, 0),
        (&[0x0F, 0x22, 0xD9], PRIMARY, p::CR3_LOAD_EXITING, reason::CR_ACCESS, 0x103), // cr3, rcx
        (&[0x0F, 0x20, 0xDA], PRIMARY, p::CR3_STORE_EXITING, reason::CR_ACCESS, 0x213), // rdx, cr3
        (&[0x44, 0x0F, 0x22, 0xC0], PRIMARY, p::CR8_LOAD_EXITING, reason::CR_ACCESS, 0x008),
        (&[0x45, 0x0F, 0x20, 0xC1], PRIMARY, p::CR8_STORE_EXITING, reason::CR_ACCESS, 0x918), // r9
        (&[0x0F, 0x21, 0xF3], PRIMARY, p::MOV_DR_EXITING, reason::MOV_DR, 0x316),             // rbx, dr6
        (&[0xE4, 0x71], PRIMARY, p::UNCONDITIONAL_IO_EXITING, reason::IO, 0x71_0048),
        (&[0xEF], PRIMARY, p::UNCONDITIONAL_IO_EXITING, reason::IO, 0x3F8_0003), // out dx, eax
        (&[0xF3, 0x6C], PRIMARY, p::UNCONDITIONAL_IO_EXITING, reason::IO, 0x3F8_0038), // rep insb
        (&[0xF3, 0x90], PRIMARY, p::PAUSE_EXITING, reason::PAUSE, 0),
        (&[0x0F, 0x01, 0xC8], PRIMARY, p::MONITOR_EXITING, reason::MONITOR, 0),
        (&[0x0F, 0x01, 0xC9], PRIMARY, p::MWAIT_EXITING, reason::MWAIT, 0),
        (&[0x0F, 0x09], SECONDARY, s::WBINVD_EXITING, reason::WBINVD, 0),
        (&[0x0F, 0x01, 0x43, 0x10], SECONDARY, s::DESCRIPTOR_TABLE_EXITING, reason::GDTR_IDTR, 0x10),
        (&[0x0F, 0xC7, 0xF0], SECONDARY, s::RDRAND_EXITING, reason::RDRAND, 0), // eax
        (&[0x49, 0x0F, 0xC7, 0xF9], SECONDARY, s::RDSEED_EXITING, reason::RDSEED, 0), // r9
        (&[0x0F, 0x00, 0xC8], SECONDARY, s::DESCRIPTOR_TABLE_EXITING, reason::LDTR_TR, 0), // str eax
    ];
    for &(bytes, word, bit, why, qualification) in rows {
        for on in [false, true] {
            let mut bed = Bed::new();
            bed.set(SECONDARY, s::ENABLE_RDTSCP).set(PRIMARY, p::USE_MSR_BITMAPS);
            bed.code(&[0x0F, 0x0B].repeat(16)).code(bytes);
            if on {
                bed.set(word, bit);
            }
            let core = bed.core();
            core.gpr = [0x1234, PML4, 0x3F8, 0x5000, 0, 0, 0, 0x6000, 0, 0, 0, 0, 0, 0, 0, 0];
            let e = bed.launch();
            assert_eq!(on, e.reason == why, "{bytes:x?}: {e:x?}");
            if !on {
                continue;
            }
            assert_eq!((qualification, bytes.len() as u32), (e.qualification, e.length), "{bytes:x?}");
            assert_eq!(CODE, bed.read(f::GUEST_RIP), "{bytes:x?}");
            assert_eq!(1, bed.core().counts.exits.iter().sum::<u64>());
        }
    }
}

#[test]
fn cpuid_msrs_and_vmcall_exit_without_being_asked_for() {
    for (bytes, why) in [
        (&[0x0F, 0xA2][..], reason::CPUID),
        (&[0x0F, 0x32], reason::RDMSR),
        (&[0x0F, 0x30], reason::WRMSR),
        (&[0x0F, 0x08], reason::INVD),
        (&[0x0F, 0x01, 0xC1], reason::VMCALL),
        (&[0x0F, 0x01, 0xC2], reason::VMLAUNCH),
        (&[0x0F, 0x01, 0xC3], reason::VMRESUME),
        (&[0x0F, 0x01, 0xC4], reason::VMXOFF),
    ] {
        let mut bed = Bed::new();
        bed.code(bytes);
        let e = bed.launch();
        assert_eq!((why, bytes.len() as u32), (e.reason, e.length), "{bytes:x?}");
    }
}

#[test]
fn vmx_instructions_in_a_guest_describe_their_operands() {
    // (code, reason, displacement, information)
    let rows: &[(&[u8], u32, u64, u32)] = &[
        // vmptrld [rbx+rcx*4+8]
        (&[0x0F, 0xC7, 0x74, 0x8B, 0x08], reason::VMPTRLD, 8, 2 | 2 << 7 | 3 << 15 | 1 << 18 | 3 << 23),
        // vmclear [rsp-8]
        (
            &[0x66, 0x0F, 0xC7, 0x74, 0x24, 0xF8],
            reason::VMCLEAR,
            8u64.wrapping_neg(),
            2 << 7 | 2 << 15 | 1 << 22 | 4 << 23,
        ),
        // vmptrst [rip+0x100]: relative to the next instruction
        (
            &[0x0F, 0xC7, 0x3D, 0x00, 0x01, 0x00, 0x00],
            reason::VMPTRST,
            CODE + 7 + 0x100,
            2 << 7 | 3 << 15 | 1 << 22 | 1 << 27,
        ),
        // vmread rdx, r9: r/m is rdx, the field in r9
        (&[0x44, 0x0F, 0x78, 0xCA], reason::VMREAD, 0, 1 << 10 | 2 << 3 | 9 << 28),
        // vmwrite r9, rdx: the field in r9, r/m is rdx
        (&[0x44, 0x0F, 0x79, 0xCA], reason::VMWRITE, 0, 1 << 10 | 2 << 3 | 9 << 28),
        // invept rcx, [ebx]
        (
            &[0x67, 0x66, 0x0F, 0x38, 0x80, 0x0B],
            reason::INVEPT,
            0,
            1 << 7 | 3 << 15 | 1 << 22 | 3 << 23 | 1 << 28,
        ),
        // invvpid rdi, [rbp]
        (
            &[0x66, 0x0F, 0x38, 0x81, 0x7D, 0x00],
            reason::INVVPID,
            0,
            2 << 7 | 2 << 15 | 1 << 22 | 5 << 23 | 7 << 28,
        ),
    ];
    for &(bytes, why, displacement, info) in rows {
        let mut bed = Bed::new();
        bed.code(bytes);
        let e = bed.launch();
        assert_eq!((why, bytes.len() as u32), (e.reason, e.length), "{bytes:x?}");
        assert_eq!((displacement, info), (e.qualification, e.instr_info), "{why} {:#x}", e.instr_info);
    }
}

#[test]
fn random_numbers_that_exit_tell_their_register_and_its_size() {
    // rdrand dx; rdrand edi; rdrand r9; rdseed r10w; rdseed esi; rdseed rbx
    let rows: &[(&[u8], u32)] = &[
        (&[0x66, 0x0F, 0xC7, 0xF2], 2 << 3),
        (&[0x0F, 0xC7, 0xF7], 7 << 3 | 1 << 11),
        (&[0x49, 0x0F, 0xC7, 0xF1], 9 << 3 | 2 << 11),
        (&[0x66, 0x41, 0x0F, 0xC7, 0xFA], 10 << 3),
        (&[0x0F, 0xC7, 0xFE], 6 << 3 | 1 << 11),
        (&[0x48, 0x0F, 0xC7, 0xFB], 3 << 3 | 2 << 11),
    ];
    for &(bytes, info) in rows {
        let mut bed = Bed::new();
        bed.set(SECONDARY, secondary::RDRAND_EXITING | secondary::RDSEED_EXITING).code(bytes);
        let e = bed.launch();
        assert_eq!((info, 0, bytes.len() as u32), (e.instr_info, e.qualification, e.length), "{bytes:x?}");
        assert_eq!(0, bed.core().random.drawn);
    }
}

#[test]
fn hlt_under_sti_keeps_the_shadow_in_the_vmcs() {
    let mut bed = Bed::new();
    bed.code(&[0xFB, 0xF4]).set(PRIMARY, primary::HLT_EXITING); // sti; hlt
    let e = bed.launch();
    assert_eq!((reason::HLT, CODE + 1), (e.reason, bed.read(f::GUEST_RIP)));
    assert_eq!((1, 0), (bed.read(f::GUEST_INTERRUPTIBILITY_STATE), bed.read(f::GUEST_ACTIVITY_STATE)));
}

#[test]
fn a_guest_that_waits_wakes_for_the_preemption_timer() {
    let mut bed = Bed::new();
    bed.code(&[0xF4]).set(PIN, TIMER_ON).write(f::PREEMPTION_TIMER_VALUE, 1_000_000);
    let e = bed.launch();
    assert_eq!((reason::PREEMPTION_TIMER, 1), (e.reason, bed.read(f::GUEST_ACTIVITY_STATE)));
    assert_eq!(CODE + 1, bed.read(f::GUEST_RIP));
    assert_eq!(1_000_000, bed.core().tsc());
}

#[test]
fn under_a_tpr_shadow_cr8_is_the_virtual_apics_and_falling_below_the_threshold_exits() {
    let mut bed = Bed::new();
    bed.set(PRIMARY, primary::USE_TPR_SHADOW).write(f::TPR_THRESHOLD, 3);
    bed.core().mem.store(VIRTUAL_APIC + 0x80, 4, 0x50);
    // mov r8, cr8; mov al, 3; mov cr8, rax; dec al; mov cr8, rax; nop
    bed.code(&[0x45, 0x0F, 0x20, 0xC0, 0xB0, 0x03, 0x44, 0x0F, 0x22, 0xC0]);
    bed.code_at(10, &[0xFE, 0xC8, 0x44, 0x0F, 0x22, 0xC0, 0x90]);
    let e = bed.launch();
    assert_eq!((reason::TPR_BELOW_THRESHOLD, CODE + 16), (e.reason, bed.read(f::GUEST_RIP)));
    assert_eq!((5, 0x20), (bed.core().gpr[8], bed.core().mem.load(VIRTUAL_APIC + 0x80, 1)));
}

#[test]
fn msr_areas_are_loaded_and_stored() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0xA2]);
    let lists =
        [(LISTS, 0xC000_0081_u64, 0x11), (LISTS + 16, 0xC000_0082, 0), (LISTS + 32, 0xC000_0083, 0x33)];
    for (at, index, value) in lists {
        bed.core().mem.store(at, 8, index);
        bed.core().mem.store(at + 8, 8, value);
    }
    bed.core().msr.lstar = 0x22;
    bed.write(f::ENTRY_MSR_LOAD_COUNT, 1).write(f::ENTRY_MSR_LOAD_ADDRESS, LISTS);
    bed.write(f::EXIT_MSR_STORE_COUNT, 1).write(f::EXIT_MSR_STORE_ADDRESS, LISTS + 16);
    bed.write(f::EXIT_MSR_LOAD_COUNT, 1).write(f::EXIT_MSR_LOAD_ADDRESS, LISTS + 32);
    bed.launch();
    let core = bed.core();
    assert_eq!((0x11, 0x22, 0x33), (core.msr.star, core.mem.load(LISTS + 24, 8), core.msr.cstar));
}

#[test]
fn a_bad_msr_list_at_an_exit_is_a_vmx_abort() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0xA2]);
    bed.write(f::EXIT_MSR_LOAD_COUNT, 1).write(f::EXIT_MSR_LOAD_ADDRESS, LISTS); // MSR 0: none
    let e = bed.launch();
    assert_eq!((reason::SHUTDOWN, 4), (e.reason, e.qualification));
    assert_eq!(4, bed.core().mem.load(VMCS + f::ABORT_INDICATOR, 4));
    assert_eq!(reason::SHUTDOWN, bed.run().reason);
}

#[test]
fn accesses_of_the_apic_access_page_exit_but_for_the_shadowed_tpr() {
    const PAGE: u64 = 0x5_0000; // guest-physical and linear
    let at = |offset: u64| (PAGE + offset) as u32;
    let read = |offset| [&[0xA1][..], &u64::from(at(offset)).to_le_bytes()].concat(); // mov eax, [..]
    let write = |offset| [&[0xA3][..], &u64::from(at(offset)).to_le_bytes()].concat();
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for (code, shadow, qualification) in [
            (read(0x20), false, Some(0x0020)),
            (write(0xB0), false, Some(0x10B0)),
            (read(0x80), false, Some(0x0080)),
            (read(0x80), true, None),
            (write(0x80), true, None),
            (read(0x84), true, Some(0x0084)),
        ] {
            let mut bed = Bed::on(engine);
            bed.code(&code).code_at(9, &[0x0F, 0x01, 0xC1]);
            bed.set(SECONDARY, secondary::VIRTUALIZE_APIC_ACCESSES);
            bed.write(f::APIC_ACCESS_ADDRESS, GUEST + PAGE);
            if shadow {
                bed.set(PRIMARY, primary::USE_TPR_SHADOW);
                bed.core().mem.store(VIRTUAL_APIC + 0x80, 4, 0x70);
            }
            let e = bed.launch();
            match qualification {
                Some(q) => {
                    assert_eq!((reason::APIC_ACCESS, q), (e.reason, e.qualification));
                    assert_eq!(CODE, bed.read(f::GUEST_RIP));
                }
                None => {
                    assert_eq!(reason::VMCALL, e.reason);
                    let expected = if code[0] == 0xA1 { (0x70, 0x70) } else { (0, 0) };
                    let core = bed.core();
                    assert_eq!(expected, (core.gpr[0], core.mem.load(VIRTUAL_APIC + 0x80, 4)));
                }
            }
            assert_eq!(0, bed.core().mem.load(GUEST + PAGE + 0x80, 8), "the page itself is untouched");
        }
    }
}

const EXCEPTION_MASK: u64 = 0x8000_07FF;
const UD_EXIT: u64 = 0x8000_0306;
const GP_EXIT: u64 = 0x8000_0B0D;

/// The guest runs at CPL 3.
fn unprivileged(bed: &mut Bed) {
    bed.write(f::GUEST_CS, 8 | 3).write(f::GUEST_CS_ACCESS_RIGHTS, 0xA0FB);
    bed.write(f::GUEST_SS, 0x10 | 3).write(f::GUEST_SS_ACCESS_RIGHTS, 0xC0F3);
}

#[test]
fn umip_comes_before_the_exits_of_descriptor_tables() {
    const UMIP: u64 = 1 << 11;
    // sgdt [rbx]; sidt [rbx]; sldt eax; str eax; smsw eax
    let rows: [(&[u8], Option<u32>); 5] = [
        (&[0x0F, 0x01, 0x03], Some(reason::GDTR_IDTR)),
        (&[0x0F, 0x01, 0x0B], Some(reason::GDTR_IDTR)),
        (&[0x0F, 0x00, 0xC0], Some(reason::LDTR_TR)),
        (&[0x0F, 0x00, 0xC8], Some(reason::LDTR_TR)),
        (&[0x0F, 0x01, 0xE0], None),
    ];
    for (code, why) in rows {
        for (is_user, umip) in [(false, 0), (false, UMIP), (true, 0), (true, UMIP)] {
            let mut bed = Bed::new();
            bed.set(SECONDARY, secondary::DESCRIPTOR_TABLE_EXITING).set(PRIMARY, primary::HLT_EXITING);
            let cr4 = bed.read(f::GUEST_CR4);
            bed.write(f::GUEST_CR4, cr4 | umip);
            if is_user {
                unprivileged(&mut bed);
            }
            bed.code(code).code_at(code.len() as u64, &[0x0F, 0x0B]);
            // Not canonical: UMIP and the exit come before the operand.
            bed.core().gpr[3] = 1 << 62;
            let e = bed.launch();
            if is_user && umip != 0 {
                assert_eq!(GP_EXIT & EXCEPTION_MASK, u64::from(e.intr_info) & EXCEPTION_MASK, "{code:x?}");
            } else if let Some(why) = why {
                assert_eq!((why, code.len() as u32), (e.reason, e.length), "{code:x?}");
            } else {
                assert_eq!(UD_EXIT & EXCEPTION_MASK, u64::from(e.intr_info) & EXCEPTION_MASK, "{code:x?}");
            }
        }
    }
}

#[test]
fn xsetbv_exits_after_its_own_ud_and_gp() {
    const OSXSAVE: u64 = 1 << 18;
    for (is_user, enabled, expected) in
        [(false, true, None), (true, true, Some(GP_EXIT)), (false, false, Some(UD_EXIT))]
    {
        let mut bed = Bed::new();
        let cr4 = bed.read(f::GUEST_CR4);
        bed.write(f::GUEST_CR4, cr4 | if enabled { OSXSAVE } else { 0 });
        if is_user {
            unprivileged(&mut bed);
        }
        bed.code(&[0x0F, 0x01, 0xD1]);
        // Neither an index nor a value that would do.
        bed.core().gpr[..3].copy_from_slice(&[0, 7, 0]);
        let e = bed.launch();
        match expected {
            None => assert_eq!((reason::XSETBV, 3), (e.reason, e.length)),
            Some(info) => assert_eq!(info & EXCEPTION_MASK, u64::from(e.intr_info) & EXCEPTION_MASK),
        }
        assert_eq!(1, bed.core().xcr0);
    }
}

#[test]
fn xsaves_and_xrstors_must_be_enabled_and_exit_for_supervisor_components() {
    const OSXSAVE: u64 = 1 << 18;
    for (modrm, why) in [(0x2B, reason::XSAVES), (0x1B, reason::XRSTORS)] {
        // (enabled, IA32_XSS, bitmap, EAX, what comes)
        let rows = [
            (false, 0, 0, 3, Some(reason::EXCEPTION_OR_NMI)),
            (true, 0, u64::MAX, 3, None),
            (true, 0x100, 0x100, 3, None),
            (true, 0x100, 0x800, 0x100, None),
            (true, 0x100, 0x100, 0x100, Some(why)),
        ];
        for (enabled, xss, bitmap, eax, expected) in rows {
            let mut bed = Bed::new();
            let cr4 = bed.read(f::GUEST_CR4);
            bed.write(f::GUEST_CR4, cr4 | OSXSAVE).write(f::XSS_EXITING_BITMAP, bitmap);
            if enabled {
                bed.set(SECONDARY, secondary::ENABLE_XSAVES);
            }
            bed.set(PRIMARY, primary::HLT_EXITING);
            bed.code(&[0xF4]).code(&[0x0F, 0xC7, modrm, 0xF4]);
            let core = bed.core();
            core.msr.xss = xss;
            core.gpr[..4].copy_from_slice(&[eax, 0, 0, 0x5000]);
            core.mem.store(GUEST + 0x5208, 8, 1 << 63);
            let e = bed.launch();
            assert_eq!(expected.unwrap_or(reason::HLT), e.reason, "{enabled} {xss:x} {bitmap:x}: {e:x?}");
            if expected == Some(why) {
                assert_eq!((2 << 7 | 3 << 15 | 1 << 22 | 3 << 23, 3), (e.instr_info & 0x0FFF_FFFF, e.length));
            }
        }
    }
}
