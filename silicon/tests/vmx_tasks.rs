//! Task switches in a guest exit, with what software needs to carry them out (SDM 3C, "Treatment
//! of Task Switches", "Saving RIP, RSP, RFLAGS, and SSP").

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::entry;
use vmx_bed::*;

const OTHER_TSS: u64 = 0x30;
const RF: u64 = 1 << 16;

/// A 32-bit guest without paging, with another task, and gates to it for #UD and two interrupts.
fn guest(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    bed.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).write(f::GUEST_EFER, 0);
    bed.write(f::GUEST_CS_ACCESS_RIGHTS, 0xC09B).write(f::GUEST_CR0, 0x31);
    bed.write(f::EXCEPTION_BITMAP, 0);
    bed.guest_store(GDT + 8, 0x00CF_9B00_0000_FFFF);
    bed.guest_store(GDT + OTHER_TSS, 0x0000_8900_0000_0067 | (TSS + 0x100) << 16);
    for vector in [6, 0x80, 0x81] {
        bed.guest_store(IDT + 8 * vector, 0xE500 << 32 | OTHER_TSS << 16);
    }
    bed
}

/// Source of the switch, selector, IDT-vectoring information, instruction length, saved RIP and RF.
fn outcome(bed: &mut Bed) -> (u64, u64, u32, u32, u64, bool) {
    let e = bed.launch();
    assert_eq!(reason::TASK_SWITCH, e.reason);
    let (rip, flags) = (bed.read(f::GUEST_RIP), bed.read(f::GUEST_RFLAGS));
    (e.qualification >> 30, e.qualification & 0xFFFF, e.idt_info, e.length, rip - CODE, flags & RF != 0)
}

#[test]
fn what_is_saved_is_what_the_old_tss_would_get() {
    const FAR_JUMP: [u8; 7] = [0xEA, 0, 0, 0, 0, 0x30, 0];
    const FAR_CALL: [u8; 7] = [0x9A, 0, 0, 0, 0, 0x30, 0];
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for before in [0, RF] {
            let start = |code: &[u8]| {
                let mut bed = guest(engine);
                bed.code(code).write(f::GUEST_RFLAGS, 0x202 | before);
                bed
            };
            // An instruction that ends in another task is done: RF is over.
            assert_eq!((2, OTHER_TSS, 0, 7, 0, false), outcome(&mut start(&FAR_JUMP)));
            assert_eq!((0, OTHER_TSS, 0, 7, 0, false), outcome(&mut start(&FAR_CALL)));
            assert_eq!((3, OTHER_TSS, 0x8000_0480, 2, 0, false), outcome(&mut start(&[0xCD, 0x80])));
            // A fault sets it, wherever it goes.
            assert_eq!((3, OTHER_TSS, 0x8000_0306, 0, 0, true), outcome(&mut start(&[0x0F, 0x0B])));
            // An interrupt before the instruction leaves it as it is.
            let mut bed = start(&[0x90]);
            bed.write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0081);
            assert_eq!((3, OTHER_TSS, 0x8000_0081, 0, 0, before != 0), outcome(&mut bed));
        }
    }
}
