//! VMCS shadowing (SDM 3C, "VMCS Types: Ordinary and Shadow"; SDM 3D, "VMREAD", "VMWRITE"), on both
//! engines.

mod vmx_bed;

use silicon::arch::bits::rflags::{CF, ZF};
use silicon::arch::exit::reason;
use silicon::arch::vmcs::{self as f, REVISION, SHADOW};
use silicon::processor::EngineKind;
use silicon::vmx::NO_VMCS;
use silicon::vmx::controls::secondary::VMCS_SHADOWING;
use silicon::vmx::instructions::{self as vmx, VmFail};
use vmx_bed::*;

const READ_BITMAP: u64 = 0xA000;
const WRITE_BITMAP: u64 = 0xB000;
/// vmread rax, rcx; vmcall
const READ: [u8; 6] = [0x0F, 0x78, 0xC8, 0x0F, 0x01, 0xC1];
/// vmwrite rcx, rax; vmcall
const WRITE: [u8; 6] = [0x0F, 0x79, 0xC8, 0x0F, 0x01, 0xC1];

/// `OTHER_VMCS` is a shadow VMCS that the guest reads and writes.
fn beds() -> [Bed; 2] {
    [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
        let mut bed = Bed::on(engine);
        bed.set(SECONDARY, VMCS_SHADOWING).write(f::VMCS_LINK_POINTER, OTHER_VMCS);
        bed.write(f::VMREAD_BITMAP, READ_BITMAP).write(f::VMWRITE_BITMAP, WRITE_BITMAP);
        bed.core().mem.store(OTHER_VMCS, 4, u64::from(REVISION | SHADOW));
        bed
    })
}

fn shadow(bed: &mut Bed, field: u32) -> u64 {
    let at = OTHER_VMCS + f::locate(field).unwrap();
    bed.core().mem.load(at, 8)
}

/// Run one instruction with a field's number in RCX: the exit reason, and the outcome in RFLAGS.
fn go(bed: &mut Bed, code: &[u8], field: u64, rax: u64) -> (u32, bool, bool) {
    bed.relaunchable().code(code).write(f::GUEST_RIP, CODE).write(f::GUEST_RFLAGS, 0x8D7);
    (bed.core().gpr[0], bed.core().gpr[1]) = (rax, field);
    let e = bed.launch();
    let flags = bed.read(f::GUEST_RFLAGS);
    assert!(e.reason != reason::VMCALL || flags & 0x896 == 2, "OF, SF, PF, AF");
    (e.reason, flags & CF != 0, flags & ZF != 0)
}

#[test]
fn a_guest_reads_and_writes_the_linked_vmcs() {
    for mut bed in beds() {
        let own = bed.read(f::GUEST_CR3);
        let fields = [f::GUEST_CR3, f::HOST_ES, f::PIN_CONTROLS, f::EPT_POINTER];
        for (n, field) in fields.into_iter().enumerate() {
            let value = 0xABCD_1234_5678_0000 + n as u64;
            assert_eq!((reason::VMCALL, false, false), go(&mut bed, &WRITE, u64::from(field), value));
            let kept = value & f::mask_of(field);
            assert_eq!(kept, shadow(&mut bed, field));
            assert_eq!((reason::VMCALL, false, false), go(&mut bed, &READ, u64::from(field), 0));
            assert_eq!(kept, bed.core().gpr[0]);
        }
        // The high half of a 64-bit field, too.
        go(&mut bed, &WRITE, u64::from(f::EPT_POINTER | 1), 7);
        assert_eq!(7, shadow(&mut bed, f::EPT_POINTER) >> 32);
        assert_eq!(own, bed.read(f::GUEST_CR3), "the current VMCS is as before");
    }
}

#[test]
fn the_bitmaps_pick_fields_by_direction() {
    for mut bed in beds() {
        let field = u64::from(f::GUEST_RSP);
        for (map, code, why, other) in
            [(READ_BITMAP, READ, reason::VMREAD, WRITE), (WRITE_BITMAP, WRITE, reason::VMWRITE, READ)]
        {
            bed.core().mem.store(map + field / 8, 1, 1 << (field % 8));
            assert_eq!(why, go(&mut bed, &code, field, 0).0);
            assert_eq!(CODE, bed.read(f::GUEST_RIP));
            assert_eq!(reason::VMCALL, go(&mut bed, &other, field, 0).0);
            assert_eq!(reason::VMCALL, go(&mut bed, &code, field ^ 2, 0).0);
            // Bits 63:15 that are set always exit.
            for bit in [15, 31, 32, 63] {
                assert_eq!(why, go(&mut bed, &code, 0x681E | 1 << bit, 0).0);
            }
            bed.core().mem.store(map + field / 8, 1, 0);
            bed.clear(SECONDARY, VMCS_SHADOWING).write(f::VMCS_LINK_POINTER, u64::MAX);
            assert_eq!(why, go(&mut bed, &code, 0x681E, 0).0);
            bed.set(SECONDARY, VMCS_SHADOWING).write(f::VMCS_LINK_POINTER, OTHER_VMCS);
        }
    }
}

#[test]
fn failures_are_in_rflags_and_in_the_linked_vmcs() {
    for mut bed in beds() {
        assert_eq!((reason::VMCALL, false, true), go(&mut bed, &READ, 0x6C18, 0));
        assert_eq!((12, 0), (shadow(&mut bed, f::VM_INSTRUCTION_ERROR), bed.read(f::VM_INSTRUCTION_ERROR)));
        assert_eq!((reason::VMCALL, false, true), go(&mut bed, &WRITE, u64::from(f::EXIT_REASON), 0));
        assert_eq!(13, shadow(&mut bed, f::VM_INSTRUCTION_ERROR));
        bed.write(f::VMCS_LINK_POINTER, u64::MAX);
        assert_eq!((reason::VMCALL, true, false), go(&mut bed, &READ, 0x6800, 0));
        assert_eq!((reason::VMCALL, true, false), go(&mut bed, &WRITE, 0x6800, 0));
        // Privilege comes after the exit, before the rest.
        bed.write(f::GUEST_CS, 0x1B).write(f::GUEST_CS_ACCESS_RIGHTS, 0xA0FB);
        bed.write(f::GUEST_SS, 0x23).write(f::GUEST_SS_ACCESS_RIGHTS, 0xC0F3);
        assert_eq!(reason::EXCEPTION_OR_NMI, go(&mut bed, &READ, 0x6800, 0).0);
        assert_eq!(13, bed.read(f::EXIT_INTERRUPTION_INFORMATION) & 0xFF);
        bed.core().mem.store(READ_BITMAP + 0x6800 / 8, 1, 1);
        assert_eq!(reason::VMREAD, go(&mut bed, &READ, 0x6800, 0).0);
    }
}

#[test]
fn a_shadow_vmcs_can_be_current_but_not_entered() {
    let [mut bed, _] = beds();
    let core = bed.core();
    vmx::vmclear(core, OTHER_VMCS).unwrap();
    vmx::vmptrld(core, OTHER_VMCS).unwrap();
    vmx::vmwrite(core, f::GUEST_CR3, 0x5000).unwrap();
    assert_eq!((Ok(0x5000), Ok(OTHER_VMCS)), (vmx::vmread(core, f::GUEST_CR3), vmx::vmptrst(core)));
    assert_eq!(Err(VmFail(0)), vmx::vmlaunch(core));
    assert_eq!(Err(VmFail(0)), vmx::vmresume(core));
    vmx::vmclear(core, OTHER_VMCS).unwrap();
    assert_eq!(Ok(NO_VMCS), vmx::vmptrst(core));
    // The rest of the identifier still counts, and VMXON takes no shadow.
    core.mem.store(OTHER_VMCS, 4, u64::from(REVISION ^ 1 | SHADOW));
    vmx::vmptrld(core, VMCS).unwrap();
    assert_eq!(Err(VmFail(11)), vmx::vmptrld(core, OTHER_VMCS));
    core.mem.store(OTHER_VMCS, 4, u64::from(REVISION | SHADOW));
    vmx::vmxoff(core).unwrap();
    assert_eq!(Err(VmFail(0)), vmx::vmxon(core, OTHER_VMCS));
}

#[test]
fn the_capability_and_its_checks() {
    let caps = silicon::vmx::capabilities::read(0x48B).unwrap();
    assert_ne!(0, caps >> 32 & u64::from(VMCS_SHADOWING));
    for (field, value) in [(f::VMREAD_BITMAP, 8), (f::VMWRITE_BITMAP, 8), (f::VMREAD_BITMAP, 1 << 46)] {
        let [mut bed, _] = beds();
        bed.write(field, value);
        assert_eq!(Err(VmFail(7)), bed.try_launch());
    }
    // The link pointer's VMCS is a shadow exactly if the control is 1.
    for (has_shadowing, revision, fits) in [
        (true, REVISION | SHADOW, true),
        (true, REVISION, false),
        (false, REVISION | SHADOW, false),
        (false, REVISION, true),
        (true, REVISION ^ 1 | SHADOW, false),
    ] {
        let [mut bed, _] = beds();
        bed.code(&[0x0F, 0x01, 0xC1]).core().mem.store(OTHER_VMCS, 4, u64::from(revision));
        if !has_shadowing {
            bed.clear(SECONDARY, VMCS_SHADOWING);
        }
        let e = bed.launch();
        let want = if fits { (reason::VMCALL, 0) } else { (reason::ENTRY_GUEST_STATE, 4) };
        assert_eq!(want, (e.reason, e.qualification), "{has_shadowing} {revision:#x}");
    }
}
