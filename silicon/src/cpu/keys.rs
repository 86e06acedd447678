//! Protection keys (SDM 3A, "Protection Keys"): which are in force, RDPKRU and WRPKRU.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::cr4;
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, gp, ud};
use crate::mmu::walk::Keys;

impl Core {
    /// The rights that keys leave now.
    #[must_use]
    pub fn keys(&self) -> Keys {
        if self.cr4 & (cr4::PKE | cr4::PKS) == 0 || !self.is_long() {
            return Keys::default();
        }
        let when = |bit: u64, rights: u32| if self.cr4 & bit != 0 { rights } else { 0 };
        Keys { user: when(cr4::PKE, self.pkru), supervisor: when(cr4::PKS, self.msr.pkrs as u32) }
    }

    /// Write PKRU.
    pub fn set_pkru(&mut self, value: u32) {
        if self.pkru == value {
            return;
        }
        self.pkru = value;
        self.attention = 1; // generated code knows pages by the old rights
    }

    /// Load IA32_PKRS.
    pub fn set_pkrs(&mut self, value: u64) {
        self.msr.pkrs = value;
        self.attention = 1;
    }
}

/// RDPKRU, WRPKRU.
///
/// # Errors
/// #UD without CR4.PKE; #GP(0) unless ECX, and for a write EDX, is 0.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let is_write = insn.mnemonic() == Mnemonic::Wrpkru;
    if core.cr4 & cr4::PKE == 0 {
        return Err(ud());
    }
    let [eax, ecx, edx] = [0, 1, 2].map(|n| core.gpr[n] as u32);
    if ecx != 0 || is_write && edx != 0 {
        return Err(gp(0));
    }
    if is_write {
        core.set_pkru(eax);
    } else {
        (core.gpr[0], core.gpr[2]) = (core.pkru.into(), 0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::bits::cr0;
    use crate::arch::exception::vector;
    use crate::cpu::msr;
    use crate::cpu::step::step;
    use crate::cpu::testbed::{PML4, fault, long};
    use crate::mmu::access::Who;
    use crate::mmu::walk::Access;

    const UD: (u8, Option<u32>) = (vector::UD, None);
    const GP0: (u8, Option<u32>) = (vector::GP, Some(0));
    /// The second 2 MBytes, of key 5.
    const PAGE: u64 = 0x20_0000;

    fn run(core: &mut Core, code: &[u8], gprs: [u64; 3]) -> Exec<()> {
        core.rip = 0x1000;
        core.mem.write_bytes(0x1000, code);
        core.gpr[..3].copy_from_slice(&gprs);
        step(core)
    }

    #[test]
    fn the_register_is_read_and_written_by_programs() {
        const READ: &[u8] = &[0x0F, 0x01, 0xEE];
        const WRITE: &[u8] = &[0x0F, 0x01, 0xEF];
        let mut core = long(3);
        assert_eq!([UD, UD], [READ, WRITE].map(|code| fault(run(&mut core, code, [0; 3]))));
        core.cr4 |= cr4::PKE;
        run(&mut core, WRITE, [u64::MAX - 7, u64::MAX << 32, u64::MAX << 32]).unwrap();
        assert_eq!(0xFFFF_FFF8, core.pkru);
        run(&mut core, READ, [1, 0, u64::MAX]).unwrap();
        assert_eq!([0xFFFF_FFF8, 0, 0], core.gpr[..3]);
        assert_eq!(GP0, fault(run(&mut core, WRITE, [0, 1, 0])));
        assert_eq!(GP0, fault(run(&mut core, WRITE, [0, 0, 1])));
        assert_eq!(GP0, fault(run(&mut core, READ, [0, 1, 0])));
        assert_eq!(0xFFFF_FFF8, core.pkru);
    }

    #[test]
    fn the_rights_of_supervisor_pages_are_an_msr() {
        let mut core = long(0);
        msr::write(&mut core, 0x6E1, 0xFFFF_FFFF).unwrap();
        assert_eq!(Some(0xFFFF_FFFF), msr::read(&mut core, 0x6E1));
        assert_eq!(GP0, fault(msr::write(&mut core, 0x6E1, 1 << 32)));
    }

    /// SDM 3A, "Protection Keys", in one screen, against every combination.
    #[test]
    fn keys_refuse_data_accesses_exactly_as_said() {
        for n in 0..1 << 11 {
            let bit = |i: u32| n >> i & 1 != 0;
            let (is_on, in_force, page_is_user, is_write) = (bit(0), bit(1), bit(2), bit(3));
            let (as_user, wp, ad, wd, is_long, is_fetch) = (bit(4), bit(5), bit(6), bit(7), bit(8), bit(9));
            let other_key = bit(10);
            let mut core = long(if as_user { 3 } else { 0 });
            let entry = PAGE | 0x83 | if page_is_user { 4 } else { 0 } | 5 << 59;
            core.mem.store(PML4 + 0x2008, 8, entry);
            let rights = u32::from(ad) | u32::from(wd) << 1;
            let rights = rights << if other_key { 12 } else { 10 };
            (core.pkru, core.msr.pkrs) = if page_is_user { (rights, 0) } else { (0, rights.into()) };
            if is_on {
                core.cr4 |= if page_is_user == in_force { cr4::PKE } else { cr4::PKS };
            }
            if !wp {
                core.cr0 &= !cr0::WP;
            }
            if !is_long {
                core.efer &= !0x400; // whatever paging it is then, it has no keys
            }
            let access = match (is_fetch, is_write) {
                (true, _) => Access::Fetch,
                (_, true) => Access::Write,
                _ => Access::Read,
            };
            let by_key = is_on
                && in_force
                && is_long
                && !is_fetch
                && !other_key
                && (ad || wd && is_write && (as_user || wp));
            for attempt in 0..2 {
                let got = core.translate(PAGE, access);
                if !is_long {
                    assert!(!matches!(got, Err(ref t) if fault::<()>(Err(t.clone())).1.unwrap() & 32 != 0));
                    continue;
                }
                let by_page = as_user && !page_is_user;
                let code = 1
                    | if is_write && !is_fetch { 2 } else { 0 }
                    | if as_user { 4 } else { 0 }
                    | if by_key { 32 } else { 0 };
                if by_key || by_page {
                    assert_eq!((vector::PF, Some(code)), fault(got), "{n:b}");
                } else {
                    got.unwrap();
                }
                if attempt == 0 {
                    // Again, with a translation at hand that somebody made before.
                    let (pkru, pkrs) = (core.pkru, core.msr.pkrs);
                    (core.pkru, core.msr.pkrs) = (0, 0);
                    let _ = core.translate(PAGE, access);
                    (core.pkru, core.msr.pkrs) = (pkru, pkrs);
                }
            }
        }
    }

    #[test]
    fn the_processors_own_accesses_obey_them_and_a_refused_write_marks_nothing() {
        let mut core = long(3);
        core.cr4 |= cr4::PKE;
        core.pkru = 2 << 10;
        core.mem.store(PML4 + 0x2008, 8, PAGE | 0x87 | 5 << 59);
        let code = fault(core.write_lin(PAGE, 8, 1, Who::Processor)).1;
        assert_eq!(Some(1 | 2 | 32), code);
        assert_eq!(0, core.mem.load(PML4 + 0x2008, 8) & 0x60);
        core.read_lin(PAGE, 8, Who::Program).unwrap();
        assert_eq!(0x20, core.mem.load(PML4 + 0x2008, 8) & 0x60);
    }
}
