//! What this processor does not have is absent everywhere: transactional synchronization (TSX), and
//! 57-bit linear addresses (LA57).

mod vmx_bed;

use silicon::arch::bits::cr4;
use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::cpu::msr;
use silicon::processor::EngineKind;
use silicon::vmx::capabilities;
use silicon::vmx::instructions::VmFail;
use vmx_bed::*;

const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];

/// Run code in a guest whose exceptions all exit: the vector, or `None` for the VMCALL behind it.
fn vector(engine: EngineKind, code: &[u8]) -> Option<u32> {
    let mut bed = Bed::on(engine);
    bed.code(&[code, &VMCALL].concat());
    bed.core().gpr[3] = STACK; // RBX: memory
    let e = bed.launch();
    match e.reason {
        reason::EXCEPTION_OR_NMI => Some(e.intr_info & 0xFF),
        reason::VMCALL => None,
        other => panic!("exit {other}"),
    }
}

#[test]
fn the_instructions_of_restricted_transactional_memory_are_undefined() {
    let rows: [&[u8]; 5] = [
        &[0xC7, 0xF8, 0, 0, 0, 0], // xbegin
        &[0x66, 0xC7, 0xF8, 0, 0], // xbegin with a 16-bit offset
        &[0x0F, 0x01, 0xD5],       // xend
        &[0x0F, 0x01, 0xD6],       // xtest
        &[0xC6, 0xF8, 0x55],       // xabort
    ];
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for code in rows {
            assert_eq!(Some(6), vector(engine, code), "{code:x?}");
        }
    }
}

#[test]
fn the_prefixes_of_hardware_lock_elision_are_ignored() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for prefix in [0xF2, 0xF3] {
            for (code, value) in [
                (&[0xF0, 0xFF, 0x03][..], 8),   // lock inc [rbx]
                (&[0x87, 0x03], 0),             // xchg [rbx], eax
                (&[0xC7, 0x03, 5, 0, 0, 0], 5), // mov [rbx], 5
                (&[0x89, 0x03], 0),             // mov [rbx], eax
                (&[0xF0, 0x0F, 0xC1, 0x03], 7), // lock xadd [rbx], eax
            ] {
                let mut bed = Bed::on(engine);
                bed.code(&[&[prefix], code, &VMCALL].concat()).guest_store(STACK, 7);
                bed.core().gpr[3] = STACK;
                assert_eq!(reason::VMCALL, bed.launch().reason, "{prefix:x} {code:x?}");
                assert_eq!(value, bed.core().mem.load(GUEST + STACK, 4), "{prefix:x} {code:x?}");
            }
        }
    }
}

#[test]
fn the_msrs_of_tsx_do_not_exist_and_arch_capabilities_promises_none() {
    const IA32_TSX_CTRL: u32 = 0x122;
    const TSX_FORCE_ABORT: u32 = 0x10F;
    let mut bed = Bed::root();
    for index in [IA32_TSX_CTRL, TSX_FORCE_ABORT] {
        assert_eq!(None, msr::read(bed.core(), index));
        for value in [0, 1, 2, 3] {
            assert!(msr::write(bed.core(), index, value).is_err());
        }
    }
    let capabilities = msr::read(bed.core(), 0x10A).unwrap();
    assert_eq!((0, 1), (capabilities >> 7 & 1, capabilities >> 8 & 1), "TSX_CTRL, TAA_NO");
}

#[test]
fn linear_addresses_have_48_bits_wherever_software_looks() {
    // CR4 in root operation, in the capability MSRs, at VM entry.
    assert_eq!((0, 0), (cr4::KNOWN & cr4::LA57, capabilities::read(0x489).unwrap() & cr4::LA57));
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        // mov rax, cr4; or rax, 1000h; mov cr4, rax
        let set = [0x0F, 0x20, 0xE0, 0x48, 0x0D, 0, 0x10, 0, 0, 0x0F, 0x22, 0xE0];
        assert_eq!(Some(13), vector(engine, &set));
        // An address that needs 49 bits is not canonical: mov rax, 1 << 47; mov al, [rax]
        let load = [0x48, 0xB8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x8A, 0x00];
        assert_eq!(Some(13), vector(engine, &load));
    }
    let mut bed = Bed::new();
    bed.code(&VMCALL).write(f::GUEST_CR4, 0x2020 | cr4::LA57);
    let e = bed.launch();
    assert_eq!((reason::ENTRY_GUEST_STATE, true), (e.reason, e.entry_failure));
    let mut bed = Bed::new();
    bed.write(f::HOST_CR4, 0x2020 | cr4::LA57);
    assert_eq!(Err(VmFail(8)), bed.try_launch());
    // The EPT has four levels, in its capability and at VM entry.
    assert_eq!(1, capabilities::read(0x48C).unwrap() >> 6 & 3);
    let mut bed = Bed::new();
    bed.write(f::EPT_POINTER, EPT | 0x26);
    assert_eq!(Err(VmFail(7)), bed.try_launch());
}

#[test]
fn without_the_execute_disable_feature_there_is_no_nxe() {
    const IA32_MISC_ENABLE: u32 = 0x1A0;
    const IA32_EFER: u32 = 0xC000_0080;
    const XD_DISABLE: u64 = 1 << 34;
    const NXE: u64 = 1 << 11;
    let mut bed = Bed::new();
    bed.code(&VMCALL).write(f::GUEST_EFER, 0x500 | NXE);
    let core = bed.core();
    let misc = msr::read(core, IA32_MISC_ENABLE).unwrap();
    msr::write(core, IA32_EFER, 0x500 | NXE).unwrap();
    msr::write(core, IA32_MISC_ENABLE, misc | XD_DISABLE).unwrap();
    assert_eq!(Some(0x500), msr::read(core, IA32_EFER));
    assert!(msr::write(core, IA32_EFER, 0x500 | NXE).is_err());
    msr::write(core, IA32_EFER, 0x501).unwrap();
    assert_eq!(Some(0x501), msr::read(core, IA32_EFER));
    let e = bed.launch();
    assert_eq!((reason::ENTRY_GUEST_STATE, true), (e.reason, e.entry_failure));
    bed.write(f::GUEST_EFER, 0x500);
    assert_eq!(reason::VMCALL, bed.launch().reason);
    bed.write(f::HOST_EFER, 0x500 | NXE);
    assert_eq!(Err(VmFail(8)), bed.relaunchable().try_launch());
    msr::write(bed.core(), IA32_MISC_ENABLE, misc).unwrap();
    msr::write(bed.core(), IA32_EFER, 0x500 | NXE).unwrap();
    assert_eq!(reason::VMCALL, bed.relaunchable().launch().reason);
}
