//! One broken rule a row: the exact way in which the VM entry fails.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::vmx::NO_VMCS;
use silicon::vmx::controls::{entry, exit, pin, primary, secondary};
use silicon::vmx::instructions::{self as vmx, VmFail};
use vmx_bed::*;

type Break = fn(&mut Bed);

/// VMLAUNCH fails with `number`, and says why; without the break it succeeds.
fn expect_failure(number: u32, rows: &[(&str, Break)]) {
    for (name, break_it) in rows {
        let mut bed = Bed::new();
        bed.code(&[0x0F, 0x0B]);
        break_it(&mut bed);
        assert_eq!(Err(VmFail(number)), bed.try_launch(), "{name}");
        assert_eq!(u64::from(number), bed.read(f::VM_INSTRUCTION_ERROR), "{name}");
        assert!(!bed.core().vmx.complaint.is_empty(), "{name}");
        assert_eq!(0, bed.core().counts.entries, "{name}");
    }
}

/// The entry fails with exit reason 33 and this qualification.
fn expect_failed_entry(rows: &[(&str, u64, Break)]) {
    for (name, qualification, break_it) in rows {
        let mut bed = Bed::new();
        bed.code(&[0x0F, 0x0B]);
        break_it(&mut bed);
        let e = bed.launch();
        let got = (e.reason, e.entry_failure, e.qualification);
        let complaint = bed.core().vmx.complaint;
        assert_eq!((reason::ENTRY_GUEST_STATE, true, *qualification), got, "{name}: {complaint}");
        assert_eq!(0x8000_0021, bed.read(f::EXIT_REASON), "{name}");
        // The host goes on at its RIP, and the VMCS is as clear as before.
        let core = bed.core();
        assert_eq!((0xFFFF_8000_0000_1000, false), (core.rip, core.vmx.non_root), "{name}");
        assert_eq!((0, 1), (core.counts.entries, core.counts.exits[33]), "{name}");
        assert_eq!(Err(VmFail(5)), vmx::vmresume(core), "{name}");
    }
}

#[test]
fn checks_on_vm_execution_control_fields() {
    const BAD: u64 = 1 << 46;
    expect_failure(
        7,
        &[
            ("a default1 pin-based bit", |b| _ = b.clear(PIN, 1 << 1)),
            ("an unknown pin-based bit", |b| _ = b.set(PIN, 1 << 9)),
            ("a default1 primary bit", |b| _ = b.clear(PRIMARY, 1 << 1)),
            ("an unknown primary bit", |b| _ = b.set(PRIMARY, 1 << 17)),
            ("an unknown secondary bit", |b| _ = b.set(SECONDARY, 1 << 13)),
            ("five CR3 targets", |b| _ = b.write(f::CR3_TARGET_COUNT, 5)),
            ("I/O bitmap A off its frame", |b| {
                b.set(PRIMARY, primary::USE_IO_BITMAPS).write(f::IO_BITMAP_A, 8);
            }),
            ("I/O bitmap B beyond the width", |b| {
                b.set(PRIMARY, primary::USE_IO_BITMAPS).write(f::IO_BITMAP_B, BAD);
            }),
            ("MSR bitmaps off their frame", |b| {
                b.set(PRIMARY, primary::USE_MSR_BITMAPS).write(f::MSR_BITMAPS, 0x800);
            }),
            ("virtual-APIC page off its frame", |b| {
                b.set(PRIMARY, primary::USE_TPR_SHADOW).write(f::VIRTUAL_APIC_ADDRESS, 0x10);
            }),
            ("a wide TPR threshold", |b| {
                b.set(PRIMARY, primary::USE_TPR_SHADOW).write(f::TPR_THRESHOLD, 0x10);
            }),
            ("a TPR threshold above VTPR", |b| {
                b.set(PRIMARY, primary::USE_TPR_SHADOW).write(f::TPR_THRESHOLD, 1);
            }),
            ("virtual NMIs alone", |b| _ = b.set(PIN, pin::VIRTUAL_NMIS)),
            ("NMI window without virtual NMIs", |b| _ = b.set(PRIMARY, primary::NMI_WINDOW_EXITING)),
            ("APIC-access page off its frame", |b| {
                b.set(SECONDARY, secondary::VIRTUALIZE_APIC_ACCESSES).write(f::APIC_ACCESS_ADDRESS, 1);
            }),
            ("VPID 0", |b| _ = b.write(f::VPID, 0)),
            ("EPT memory type 1", |b| _ = b.write(f::EPT_POINTER, EPT | 0x19)),
            ("EPT walk length 3", |b| _ = b.write(f::EPT_POINTER, EPT | 0x16)),
            ("EPT pointer reserved bit", |b| _ = b.write(f::EPT_POINTER, EPT | 0x9E)),
            ("EPT pointer beyond the width", |b| _ = b.write(f::EPT_POINTER, BAD | 0x1E)),
            ("unrestricted guest without EPT", |b| _ = b.clear(SECONDARY, secondary::ENABLE_EPT)),
        ],
    );
}

#[test]
fn checks_on_vm_exit_and_vm_entry_control_fields() {
    const CODE: u32 = f::ENTRY_EXCEPTION_ERROR_CODE;
    fn inject(b: &mut Bed, info: u64) {
        b.write(f::ENTRY_INTERRUPTION_INFORMATION, 1 << 31 | info);
    }
    expect_failure(
        7,
        &[
            ("a default1 exit bit", |b| _ = b.clear(f::EXIT_CONTROLS, 1 << 0)),
            ("an unknown exit bit", |b| _ = b.set(f::EXIT_CONTROLS, 1 << 23)),
            ("timer saved but not active", |b| {
                b.set(f::EXIT_CONTROLS, exit::SAVE_PREEMPTION_TIMER);
            }),
            ("MSR-store list unaligned", |b| {
                b.write(f::EXIT_MSR_STORE_COUNT, 1).write(f::EXIT_MSR_STORE_ADDRESS, 8);
            }),
            ("exit MSR-load list over the end", |b| {
                b.write(f::EXIT_MSR_LOAD_COUNT, 2).write(f::EXIT_MSR_LOAD_ADDRESS, (1 << 46) - 16);
            }),
            ("a default1 entry bit", |b| _ = b.clear(f::ENTRY_CONTROLS, 1 << 0)),
            ("entry to SMM", |b| _ = b.set(f::ENTRY_CONTROLS, 1 << 10)),
            ("entry MSR-load list unaligned", |b| {
                b.write(f::ENTRY_MSR_LOAD_COUNT, 1).write(f::ENTRY_MSR_LOAD_ADDRESS, 4);
            }),
            ("reserved type 1", |b| inject(b, 0x120)),
            ("NMI with vector 3", |b| inject(b, 0x203)),
            ("exception 32", |b| inject(b, 0x320)),
            ("other event with vector 1", |b| inject(b, 0x701)),
            ("#GP without error code", |b| inject(b, 0x30D)),
            ("#UD with error code", |b| inject(b, 0xB06)),
            ("interrupt with error code", |b| inject(b, 0x80D)),
            ("reserved bit 12", |b| inject(b, 0x1020)),
            ("a wide error code", |b| {
                inject(b, 0xB0D);
                b.write(CODE, 0x1_0000);
            }),
            ("software interrupt of length 0", |b| inject(b, 0x420)),
            ("software interrupt of length 16", |b| {
                inject(b, 0x420);
                b.write(f::ENTRY_INSTRUCTION_LENGTH, 16);
            }),
        ],
    );
}

#[test]
fn checks_on_host_state() {
    const BENT: u64 = 1 << 47;
    expect_failure(
        8,
        &[
            ("CR0 without PG", |b| _ = b.write(f::HOST_CR0, 0x31)),
            ("CR0 beyond 32 bits", |b| _ = b.write(f::HOST_CR0, 0x1_8001_0031)),
            ("CR4 without VMXE", |b| _ = b.write(f::HOST_CR4, 0x20)),
            ("CR4 with an unknown bit", |b| _ = b.write(f::HOST_CR4, 0x2020 | 1 << 23)),
            ("CR3 beyond the width", |b| _ = b.write(f::HOST_CR3, 1 << 46)),
            ("SYSENTER_ESP", |b| _ = b.write(f::HOST_SYSENTER_ESP, BENT)),
            ("SYSENTER_EIP", |b| _ = b.write(f::HOST_SYSENTER_EIP, BENT)),
            ("PAT type 2", |b| {
                b.set(f::EXIT_CONTROLS, exit::LOAD_PAT).write(f::HOST_PAT, 2);
            }),
            ("PERF_GLOBAL_CTRL reserved", |b| {
                b.set(f::EXIT_CONTROLS, exit::LOAD_PERF_GLOBAL_CTRL).write(f::HOST_PERF_GLOBAL_CTRL, 1 << 4);
            }),
            ("PKRS beyond 32 bits", |b| {
                b.set(f::EXIT_CONTROLS, exit::LOAD_PKRS).write(f::HOST_PKRS, 1 << 32);
            }),
            ("EFER reserved", |b| _ = b.write(f::HOST_EFER, 0x502)),
            ("EFER without LMA", |b| _ = b.write(f::HOST_EFER, 0x100)),
            ("CS with RPL", |b| _ = b.write(f::HOST_CS, 9)),
            ("TR with TI", |b| _ = b.write(f::HOST_TR, 0x1C)),
            ("null CS", |b| _ = b.write(f::HOST_CS, 0)),
            ("null TR", |b| _ = b.write(f::HOST_TR, 0)),
            ("FS base", |b| _ = b.write(f::HOST_FS_BASE, BENT)),
            ("GS base", |b| _ = b.write(f::HOST_GS_BASE, BENT)),
            ("GDTR base", |b| _ = b.write(f::HOST_GDTR_BASE, BENT)),
            ("IDTR base", |b| _ = b.write(f::HOST_IDTR_BASE, BENT)),
            ("TR base", |b| _ = b.write(f::HOST_TR_BASE, BENT)),
            ("32-bit host in IA-32e mode", |b| {
                b.clear(f::EXIT_CONTROLS, exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER);
            }),
            ("64-bit host outside IA-32e mode", |b| b.core().efer = 0),
            ("CR4 without PAE", |b| _ = b.write(f::HOST_CR4, 0x2000)),
            ("RIP", |b| _ = b.write(f::HOST_RIP, BENT)),
        ],
    );
}

#[test]
fn checks_on_guest_control_registers_and_msrs() {
    expect_failed_entry(&[
        ("CR0 without NE", 0, |b| _ = b.write(f::GUEST_CR0, 0x8001_0011)),
        ("CR0.PG without PE", 0, |b| _ = b.write(f::GUEST_CR0, 0x8001_0030)),
        ("CR4 without VMXE", 0, |b| _ = b.write(f::GUEST_CR4, 0x20)),
        ("CR4 with an unknown bit", 0, |b| _ = b.write(f::GUEST_CR4, 0x2020 | 1 << 23)),
        ("DEBUGCTL reserved", 0, |b| _ = b.write(f::GUEST_DEBUGCTL, 1 << 4)),
        ("IA-32e mode without PAE", 0, |b| _ = b.write(f::GUEST_CR4, 0x2000)),
        ("IA-32e mode without PG", 0, |b| _ = b.write(f::GUEST_CR0, 0x31)),
        ("PCIDE outside IA-32e mode", 0, |b| {
            b.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).write(f::GUEST_CR4, 0x2_2020);
        }),
        ("CR3 beyond the width", 0, |b| _ = b.write(f::GUEST_CR3, 1 << 46)),
        ("DR7 beyond 32 bits", 0, |b| _ = b.write(f::GUEST_DR7, 1 << 32)),
        ("SYSENTER_ESP", 0, |b| _ = b.write(f::GUEST_SYSENTER_ESP, 1 << 47)),
        ("PAT type 3", 0, |b| {
            b.set(f::ENTRY_CONTROLS, entry::LOAD_PAT).write(f::GUEST_PAT, 3 << 8);
        }),
        ("PERF_GLOBAL_CTRL reserved", 0, |b| {
            b.set(f::ENTRY_CONTROLS, entry::LOAD_PERF_GLOBAL_CTRL).write(f::GUEST_PERF_GLOBAL_CTRL, 1 << 35);
        }),
        ("PKRS beyond 32 bits", 0, |b| {
            b.set(f::ENTRY_CONTROLS, entry::LOAD_PKRS).write(f::GUEST_PKRS, 1 << 32);
        }),
        ("EFER reserved", 0, |b| _ = b.write(f::GUEST_EFER, 0x502)),
        ("EFER.LMA against the control", 0, |b| _ = b.write(f::GUEST_EFER, 0)),
        ("EFER.LME against LMA", 0, |b| _ = b.write(f::GUEST_EFER, 0x400)),
    ]);
}

#[test]
fn checks_on_guest_segment_registers() {
    const CS: u32 = f::GUEST_CS_ACCESS_RIGHTS;
    const SS: u32 = f::GUEST_SS_ACCESS_RIGHTS;
    const DS: u32 = f::GUEST_DS_ACCESS_RIGHTS;
    const TR: u32 = f::GUEST_TR_ACCESS_RIGHTS;
    const LDTR: u32 = f::GUEST_LDTR_ACCESS_RIGHTS;
    fn restricted(b: &mut Bed) -> &mut Bed {
        b.clear(SECONDARY, secondary::UNRESTRICTED_GUEST)
    }
    expect_failed_entry(&[
        ("TR in the LDT", 0, |b| _ = b.write(f::GUEST_TR, 0x2C)),
        ("LDTR in the LDT", 0, |b| _ = b.write(LDTR, 0x82).write(f::GUEST_LDTR, 4)),
        ("SS.RPL against CS.RPL", 0, |b| _ = restricted(b).write(f::GUEST_SS, 0x13)),
        ("TR base", 0, |b| _ = b.write(f::GUEST_TR_BASE, 1 << 47)),
        ("FS base", 0, |b| _ = b.write(f::GUEST_FS_BASE, 1 << 47)),
        ("LDTR base", 0, |b| _ = b.write(LDTR, 0x82).write(f::GUEST_LDTR_BASE, 1 << 47)),
        ("CS base over 32 bits", 0, |b| _ = b.write(f::GUEST_CS_BASE, 1 << 32)),
        ("DS base over 32 bits", 0, |b| _ = b.write(f::GUEST_DS_BASE, 1 << 32)),
        ("CS data", 0, |b| _ = restricted(b).write(CS, 0xC093)),
        ("CS not accessed", 0, |b| _ = b.write(CS, 0xA09A)),
        ("CS system", 0, |b| _ = b.write(CS, 0xA08B)),
        ("CS.DPL against SS.DPL", 0, |b| _ = b.write(CS, 0xA0FB)),
        ("conforming CS above SS.DPL", 0, |b| _ = b.write(CS, 0xA0FF)),
        ("CS not present", 0, |b| _ = b.write(CS, 0xA01B)),
        ("CS reserved bit", 0, |b| _ = b.write(CS, 0xA19B)),
        ("CS high reserved bit", 0, |b| _ = b.write(CS, 0x2_A09B)),
        ("CS with L and D", 0, |b| _ = b.write(CS, 0xE09B)),
        ("CS limit without G", 0, |b| _ = b.write(CS, 0x209B)),
        ("CS limit against G", 0, |b| {
            _ = b.write(f::GUEST_CS_LIMIT, 0xFFFF).write(f::GUEST_CS_LIMIT, 0xFFF_F000);
        }),
        ("SS code", 0, |b| _ = b.write(SS, 0xC09B)),
        ("SS not present", 0, |b| _ = b.write(SS, 0xC013)),
        ("SS.DPL against RPL", 0, |b| _ = restricted(b).write(SS, 0xC0F3).write(CS, 0xA0FB)),
        ("DS not accessed", 0, |b| _ = b.write(DS, 0xC092)),
        ("DS code without read", 0, |b| _ = b.write(DS, 0xC099)),
        ("DS system", 0, |b| _ = b.write(DS, 0xC083)),
        ("DS.DPL below RPL", 0, |b| _ = restricted(b).write(f::GUEST_DS, 0x13)),
        ("DS not present", 0, |b| _ = b.write(DS, 0xC013)),
        ("DS limit without G", 0, |b| _ = b.write(DS, 0x4093)),
        ("TR available", 0, |b| _ = b.write(TR, 0x89)),
        ("TR 16-bit in IA-32e mode", 0, |b| _ = b.write(TR, 0x83)),
        ("TR code", 0, |b| _ = b.write(TR, 0x9B)),
        ("TR not present", 0, |b| _ = b.write(TR, 0x0B)),
        ("TR limit against G", 0, |b| _ = b.write(TR, 0x808B)),
        ("TR unusable", 0, |b| _ = b.write(TR, 0x1_008B)),
        ("LDTR type", 0, |b| _ = b.write(LDTR, 0x83)),
        ("LDTR not present", 0, |b| _ = b.write(LDTR, 0x02)),
        ("virtual-8086 mode in IA-32e mode", 0, |b| _ = b.write(f::GUEST_RFLAGS, 0x2_0002)),
    ]);
}

#[test]
fn checks_on_guest_rip_rflags_and_tables() {
    expect_failed_entry(&[
        ("GDTR base", 0, |b| _ = b.write(f::GUEST_GDTR_BASE, 1 << 47)),
        ("IDTR limit", 0, |b| _ = b.write(f::GUEST_IDTR_LIMIT, 0x1_0000)),
        ("RIP", 0, |b| _ = b.write(f::GUEST_RIP, 1 << 48)),
        ("RIP below the upper half", 0, |b| _ = b.write(f::GUEST_RIP, 0xFFFE << 48)),
        ("RIP over 32 bits in compatibility mode", 0, |b| {
            b.write(f::GUEST_CS_ACCESS_RIGHTS, 0xC09B).write(f::GUEST_RIP, 1 << 32);
        }),
        ("RFLAGS bit 1", 0, |b| _ = b.write(f::GUEST_RFLAGS, 0)),
        ("RFLAGS bit 3", 0, |b| _ = b.write(f::GUEST_RFLAGS, 0xA)),
        ("RFLAGS bit 22", 0, |b| _ = b.write(f::GUEST_RFLAGS, 0x40_0002)),
        ("interrupt injected under IF = 0", 0, |b| {
            b.write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0020);
        }),
    ]);
}

#[test]
fn checks_on_guest_non_register_state() {
    const I: u32 = f::GUEST_INTERRUPTIBILITY_STATE;
    const EVENT: u32 = f::ENTRY_INTERRUPTION_INFORMATION;
    fn halted(b: &mut Bed) -> &mut Bed {
        b.write(f::GUEST_ACTIVITY_STATE, 1)
    }
    expect_failed_entry(&[
        ("activity state shutdown is not offered", 0, |b| _ = b.write(f::GUEST_ACTIVITY_STATE, 2)),
        ("HLT at DPL 3", 0, |b| {
            halted(b).write(f::GUEST_SS_ACCESS_RIGHTS, 0xC0F3).write(f::GUEST_CS_ACCESS_RIGHTS, 0xA0FB);
        }),
        ("HLT under STI", 0, |b| _ = halted(b).write(I, 1).write(f::GUEST_RFLAGS, 0x202)),
        ("#GP injected into HLT", 0, |b| _ = halted(b).write(EVENT, 0x8000_0B0D)),
        ("reserved interruptibility bit", 0, |b| _ = b.write(I, 0x20)),
        ("STI and MOV SS", 0, |b| _ = b.write(I, 3).write(f::GUEST_RFLAGS, 0x202)),
        ("STI under IF = 0", 0, |b| _ = b.write(I, 1)),
        ("interrupt injected under MOV SS", 0, |b| {
            b.write(I, 2).write(f::GUEST_RFLAGS, 0x202).write(EVENT, 0x8000_0020);
        }),
        ("NMI injected under MOV SS", 3, |b| _ = b.write(I, 2).write(EVENT, 0x8000_0202)),
        ("blocking by SMI", 0, |b| _ = b.write(I, 4)),
        ("NMI injected under virtual-NMI blocking", 0, |b| {
            b.set(PIN, pin::NMI_EXITING | pin::VIRTUAL_NMIS).write(I, 8).write(EVENT, 0x8000_0202);
        }),
        ("pending debug reserved", 0, |b| _ = b.write(f::GUEST_PENDING_DEBUG_EXCEPTIONS, 0x10)),
        ("single step not pending under MOV SS", 0, |b| {
            b.write(I, 2).write(f::GUEST_RFLAGS, 0x102);
        }),
        ("single step pending without TF in HLT", 0, |b| {
            halted(b).write(f::GUEST_PENDING_DEBUG_EXCEPTIONS, 0x4000);
        }),
        ("link pointer off its frame", 4, |b| _ = b.write(f::VMCS_LINK_POINTER, 8)),
        ("link pointer to another revision", 4, |b| _ = b.write(f::VMCS_LINK_POINTER, 0x9000)),
        ("link pointer to the current VMCS", 4, |b| _ = b.write(f::VMCS_LINK_POINTER, VMCS)),
        ("PDPTE reserved bits", 2, |b| {
            b.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).write(f::GUEST_EFER, 0);
            b.write(f::GUEST_CS_ACCESS_RIGHTS, 0xC09B).write(f::GUEST_PDPTE2, 3);
        }),
    ]);
}

#[test]
fn a_failed_load_of_an_msr_names_its_entry() {
    for (index, value) in [(0xC000_0100_u64, 0), (0x808, 0), (0xC000_0080, 2), (0x1234_5678, 0), (1 << 32, 0)]
    {
        let mut bed = Bed::new();
        for (at, word) in [(0, 0xC000_0081), (8, 7), (16, index), (24, value)] {
            bed.core().mem.store(LISTS + at, 8, word);
        }
        bed.write(f::ENTRY_MSR_LOAD_COUNT, 2).write(f::ENTRY_MSR_LOAD_ADDRESS, LISTS);
        let e = bed.launch();
        assert_eq!((reason::ENTRY_MSR_LOAD, true, 2), (e.reason, e.entry_failure, e.qualification));
        assert_eq!(7, bed.core().msr.star); // the first entry was loaded
    }
}

#[test]
fn without_a_vmcs_or_out_of_order_it_is_vmfail_invalid() {
    let mut bed = Bed::root();
    let core = bed.core();
    assert_eq!(Err(VmFail(0)), vmx::vmlaunch(core));
    assert_eq!(Err(VmFail(0)), vmx::vmread(core, f::GUEST_RIP));
    assert_eq!(Err(VmFail(0)), vmx::vmptrld(core, 8)); // error 9 has nowhere to go
    assert_eq!(Ok(NO_VMCS), vmx::vmptrst(core));
    vmx::vmxoff(core).unwrap();
    assert_eq!(Err(VmFail(0)), vmx::vmclear(core, VMCS));
    assert_eq!(Err(VmFail(0)), vmx::vmxon(core, 0x9000)); // no revision there
}

#[test]
fn vm_instruction_errors_by_number() {
    type Do = fn(&mut Bed) -> Result<(), VmFail>;
    let rows: &[(u32, Do)] = &[
        (2, |b| vmx::vmclear(b.core(), 0x800)),
        (3, |b| vmx::vmclear(b.core(), VMXON)),
        (9, |b| vmx::vmptrld(b.core(), 1 << 46)),
        (10, |b| vmx::vmptrld(b.core(), VMXON)),
        (11, |b| vmx::vmptrld(b.core(), 0x9000)),
        (12, |b| vmx::vmread(b.core(), 0x6C18).map(|_| ())),
        (12, |b| vmx::vmwrite(b.core(), 0x4003, 0)), // no high half
        (13, |b| vmx::vmwrite(b.core(), f::EXIT_REASON, 0)),
        (15, |b| vmx::vmxon(b.core(), VMXON)),
        (28, |b| vmx::invept(b.core(), 0, 0)),
        (28, |b| vmx::invept(b.core(), 1, EPT)),
        (28, |b| vmx::invvpid(b.core(), 1, 0, 0)),
        (28, |b| vmx::invvpid(b.core(), 0, 1, 1 << 47)),
        (28, |b| vmx::invvpid(b.core(), 4, 1, 0)),
        (28, |b| vmx::invvpid(b.core(), 1, 0x1_0000, 0)),
    ];
    for (number, go) in rows {
        let mut bed = Bed::new();
        assert_eq!(Err(VmFail(*number)), go(&mut bed));
        assert_eq!(u64::from(*number), bed.read(f::VM_INSTRUCTION_ERROR));
    }
}

#[test]
fn every_field_holds_its_width_and_the_halves_of_64_bit_fields_are_separate() {
    let mut bed = Bed::new();
    for &(field, name) in f::FIELDS {
        if f::type_of(field) == f::Type::ExitInformation {
            continue;
        }
        bed.write(field, u64::MAX);
        assert_eq!(f::mask_of(field), bed.read(field), "{name}");
        if field >> 13 & 3 == 1 {
            bed.write(field | 1, 0x1234_5678);
            assert_eq!(
                (0x1234_5678_FFFF_FFFF, 0x1234_5678),
                (bed.read(field), bed.read(field | 1)),
                "{name}"
            );
        }
        bed.write(field, 0);
    }
}

#[test]
fn a_changed_host_mode_is_checked_again_although_no_field_was_written() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0x0B]).launch();
    bed.core().efer = 0;
    assert_eq!(Err(VmFail(8)), vmx::vmresume(bed.core()));
}
