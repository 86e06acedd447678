//! A guest's program on both engines, compared at every stop.

use silicon::arch::exit::{Exit, reason};
use silicon::arch::segment::{Segment, seg};
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::snapshot::state_hash;
use silicon::vmx::instructions::{self as vmx, VmFail};

use super::Bed;

/// Budgets: one instruction at a time, pieces of blocks, everything at once.
pub const BUDGETS: [u64; 6] = [1, 2, 3, 7, 23, 5000];
/// What an exit leaves for the hypervisor to read.
pub const SEEN: [u32; 9] = [
    f::GUEST_RIP,
    f::GUEST_RSP,
    f::GUEST_RFLAGS,
    f::GUEST_INTERRUPTIBILITY_STATE,
    f::GUEST_CS,
    f::GUEST_SS_ACCESS_RIGHTS,
    f::GUEST_FS_BASE,
    f::GUEST_GS_BASE,
    f::GUEST_ACTIVITY_STATE,
];

/// The exit that ended it, and what can be seen then.
pub struct End {
    pub exit: Exit,
    pub seen: Vec<u64>,
    pub gpr: [u64; 16],
}

impl End {
    pub fn of(&self, field: u32) -> u64 {
        self.seen[SEEN.iter().position(|&s| s == field).unwrap()]
    }
}

/// Run `code` six times (RBP counts), then CPUID, on both engines; `vmcs` writes to the VMCS before,
/// `state` to the processor at the guest's first instruction.
pub fn agree(name: &str, code: &[u8], vmcs: impl Fn(&mut Bed), state: impl Fn(&mut Bed)) -> End {
    let mut program = vec![0xBD, 6, 0, 0, 0]; // mov ebp, 6
    program.extend(code);
    let back = -(code.len() as i32) - 8;
    program.extend([0xFF, 0xCD, 0x0F, 0x85]); // dec ebp; jnz
    program.extend(back.to_le_bytes());
    program.extend([0x0F, 0xA2]); // cpuid
    let mut end = None;
    for budget in BUDGETS {
        let mut beds = [EngineKind::Reference, EngineKind::Dbt].map(|kind| {
            let mut bed = Bed::on(kind);
            bed.code(&program);
            vmcs(&mut bed);
            assert_eq!(Ok(None), vmx::vmlaunch(bed.core()).map_err(|VmFail(n)| n), "{name}");
            state(&mut bed);
            bed.core().refresh();
            bed
        });
        loop {
            let exits = beds.each_mut().map(|b| b.processor.run(budget, &mut || false));
            let at = format!("{name}, budget {budget}, instruction {}", beds[0].core().retired());
            assert_eq!(exits[0], exits[1], "{at}");
            let [reference, dbt] = beds.each_mut().map(|b| (b.core().gpr, b.core().rip, b.core().rflags));
            assert_eq!(reference, dbt, "{at}");
            let [reference, dbt] = beds.each_mut().map(|b| b.core().seg);
            assert_eq!(reference, dbt, "{at}");
            let [reference, dbt] = beds.each_mut().map(|b| state_hash(b.core()));
            assert_eq!(reference, dbt, "{at}");
            if exits[0].reason != reason::BUDGET {
                let [seen, of_dbt] = beds.each_mut().map(|b| SEEN.map(|field| b.read(field)).to_vec());
                assert_eq!(seen, of_dbt, "{at}");
                let gpr = beds[0].core().gpr;
                let [first, ..] = exits;
                end = Some(End { exit: first, seen, gpr });
                break;
            }
        }
        if budget > 1000 && beds[1].core().retired() > 0 {
            let counters = beds[1].processor.statistics();
            assert!(counters.iter().any(|c| c.0 == "translated_blocks" && c.1 > 0), "{name}");
        }
    }
    end.unwrap()
}

pub fn nothing(_bed: &mut Bed) {}

/// Code whose end is the CPUID behind the loop.
pub fn whole(name: &str, code: &[u8], vmcs: impl Fn(&mut Bed), state: impl Fn(&mut Bed)) -> End {
    let end = agree(name, code, vmcs, state);
    assert_eq!(reason::CPUID, end.exit.reason, "{name}");
    end
}

/// Code that ends with an exception of this vector.
pub fn faults(name: &str, vector: u32, code: &[u8], state: impl Fn(&mut Bed)) -> End {
    let end = agree(name, code, nothing, state);
    let got = (end.exit.reason, end.exit.intr_info & 0xFF);
    assert_eq!((reason::EXCEPTION_OR_NMI, vector), got, "{name}");
    end
}

/// Privilege level `cpl` with flat segments.
pub fn level(bed: &mut Bed, cpl: u8) {
    let core = bed.core();
    core.cpl = cpl;
    let dpl = u32::from(cpl) << 5;
    core.seg[seg::CS] =
        Segment { base: 0, limit: u32::MAX, attr: 0xA09B | dpl, selector: 8 | u16::from(cpl) };
    core.seg[seg::SS] =
        Segment { base: 0, limit: u32::MAX, attr: 0xC093 | dpl, selector: 16 | u16::from(cpl) };
}
