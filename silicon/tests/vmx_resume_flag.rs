//! RFLAGS.RF as VM exits save it (SDM 3C, "Saving RIP, RSP, RFLAGS, and SSP").

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{pin, primary};
use vmx_bed::*;

const RF: u64 = 1 << 16;
const OUTSIDE: u64 = 0x20_0000; // mapped by the guest, not by the EPT

/// What an exit of this guest saves, when it was entered with RF clear and with RF set.
fn saved(why: u32, engine: EngineKind, code: &[u8], change: &dyn Fn(&mut Bed)) -> (bool, bool) {
    let rf = |before: u64| {
        let mut bed = Bed::on(engine);
        bed.guest_store(PML4 + 0x2008, OUTSIDE | 0x87);
        bed.code(code).write(f::GUEST_RFLAGS, 0x202 | before);
        change(&mut bed);
        assert_eq!(why, bed.launch().reason);
        bed.read(f::GUEST_RFLAGS) & RF != 0
    };
    (rf(0), rf(RF))
}

fn inject(info: u64) -> impl Fn(&mut Bed) {
    move |bed| {
        let rsp = OUTSIDE + 0x1000; // the event is delivered to where there is no memory
        bed.gate(info & 0xFF, 0x100).write(f::GUEST_RSP, rsp).write(f::EXCEPTION_BITMAP, 0);
        bed.write(f::ENTRY_INTERRUPTION_INFORMATION, info).write(f::ENTRY_INSTRUCTION_LENGTH, 2);
    }
}

#[test]
fn each_kind_of_exit() {
    let nothing = |_: &mut Bed| {};
    let halting = |bed: &mut Bed| _ = bed.set(PRIMARY, primary::HLT_EXITING);
    let timer = |bed: &mut Bed| _ = bed.set(PIN, pin::ACTIVATE_PREEMPTION_TIMER);
    let guarded = |bed: &mut Bed| _ = bed.write(f::GUEST_DR7, 0x2400);
    let guarded_outside = |bed: &mut Bed| {
        bed.gate(1, 0x100).write(f::GUEST_RSP, OUTSIDE + 0x1000).write(f::EXCEPTION_BITMAP, 0);
        bed.write(f::GUEST_DR7, 0x2400);
    };
    let read_dr7 = [0x0F, 0x21, 0xF8];
    let load = [0x8A, 0x04, 0x25, 0, 0, 0x20, 0]; // mov al, [OUTSIDE]
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for (name, why, code, change, expected) in [
            // An instruction is done with when it exits; one that faults begins again.
            ("CPUID", reason::CPUID, &[0x0F, 0xA2][..], &nothing as &dyn Fn(&mut Bed), (false, false)),
            ("VMCALL", reason::VMCALL, &[0x0F, 0x01, 0xC1], &nothing, (false, false)),
            ("HLT", reason::HLT, &[0xF4], &halting, (false, false)),
            ("#UD", reason::EXCEPTION_OR_NMI, &[0x0F, 0x0B], &nothing, (true, true)),
            ("INT3", reason::EXCEPTION_OR_NMI, &[0xCC], &nothing, (false, false)),
            ("load", reason::EPT_VIOLATION, &load, &nothing, (true, true)),
            ("#DB", reason::EXCEPTION_OR_NMI, &read_dr7, &guarded, (true, true)),
            // Between instructions it stays as it is.
            ("timer", reason::PREEMPTION_TIMER, &[0x90], &timer, (false, true)),
            // During the delivery of an event: as its image would have it.
            ("#GP", reason::EPT_VIOLATION, &[0x90], &inject(0x8000_0B0D), (true, true)),
            ("#DB", reason::EPT_VIOLATION, &read_dr7, &guarded_outside, (true, true)),
            ("INT n", reason::EPT_VIOLATION, &[0x90], &inject(0x8000_0480), (false, false)),
            ("interrupt", reason::EPT_VIOLATION, &[0x90], &inject(0x8000_0080), (false, true)),
        ] {
            assert_eq!(expected, saved(why, engine, code, change), "{name} {engine:?}");
        }
    }
}
