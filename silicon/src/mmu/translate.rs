//! Translation as the processor does it: through the TLB, walking on a miss.

use crate::addr::{PAGE_OFFSET, PHYS_MASK};
use crate::arch::bits::{cr0, cr4};
use crate::arch::exception::Exception;
use crate::arch::exit::{Exit, reason};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap};
use crate::mmu::tlb::{Entry, perm};
use crate::mmu::walk::{Access, Intent, Refusal, Space, Walker, format_of};
use crate::vmx::controls::secondary;

impl Core {
    /// The current translation regime.
    #[must_use]
    pub fn space(&self) -> Space {
        Space {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            pdpte: self.pdpte,
            eptp: self.vmx.eptp,
            by_mode: self.vmx.controls.secondary(secondary::MODE_BASED_EXECUTE),
        }
    }

    /// Tell the TLB which space is current.
    pub(crate) fn refresh_space(&mut self) {
        let pcid = if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xFFF) as u16 } else { 0 };
        self.tlb.select(self.vmx.vpid, self.vmx.eptp & !PAGE_OFFSET, pcid);
    }

    /// A number that changes whenever the permission rules of the TLB's first level change.
    #[must_use]
    pub fn l1_rules(&self) -> u128 {
        let keys = self.keys();
        u128::from(self.cr0 & cr0::WP != 0)
            | u128::from(self.cr4 & cr4::SMAP != 0) << 1
            | u128::from(self.cr0 & cr0::PG != 0) << 2
            | u128::from(keys.user) << 32
            | u128::from(keys.supervisor) << 64
    }

    /// MOV to CR3, or what flushes as much: drop the non-global translations of this PCID.
    pub fn flush_non_global(&mut self) {
        let (vpid, pcid) =
            (self.vmx.vpid, if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xFFF) as u16 } else { 0 });
        self.tlb.drop_spaces(|v, _, p| v == vpid && p == pcid, |_, _| false);
        self.refresh_space();
    }

    /// Drop every translation of the current VPID, global ones too (changes of CR0.PG, CR4, …).
    pub fn flush_guest(&mut self) {
        let vpid = self.vmx.vpid;
        self.tlb.drop_spaces(|v, _, _| v == vpid, |v, _| v == vpid);
        self.refresh_space();
    }

    fn intent(&self, access: Access, user: bool, implicit: bool) -> Intent {
        let is_on = self.cr4 & cr4::SMAP != 0 && self.is_paging();
        let smap = !user && is_on && (implicit || self.is_smap_armed());
        Intent { access, user, smap }
    }

    fn permits(&self, e: &Entry, i: Intent) -> bool {
        let page_is_user = e.perm & perm::US != 0;
        let heeds_writes = i.user || self.cr0 & cr0::WP != 0;
        if self.keys().refuses((e.perm >> perm::KEY_SHIFT) as u8, page_is_user, i.access, heeds_writes) {
            return false;
        }
        match i.access {
            Access::Fetch => {
                let smep = self.cr4 & cr4::SMEP != 0 && self.is_paging();
                e.perm & perm::X != 0 && if i.user { page_is_user } else { !(page_is_user && smep) }
            }
            Access::Read => {
                if i.user {
                    page_is_user
                } else {
                    !(page_is_user && i.smap)
                }
            }
            Access::Write => {
                let rw = e.perm & perm::RW != 0;
                e.perm & perm::DIRTY != 0
                    && if i.user {
                        page_is_user && rw
                    } else {
                        !(page_is_user && i.smap) && (rw || self.cr0 & cr0::WP == 0)
                    }
            }
        }
    }

    /// Whether a TLB entry lets the program make this access without a walk.
    #[must_use]
    pub fn allows(&self, e: &Entry, access: Access) -> bool {
        self.permits(e, self.intent(access, self.cpl == 3, false))
    }

    /// Translate for the current privilege level.  Returns the host-physical address and whether
    /// it is special (no plain memory).
    ///
    /// # Errors
    /// #PF (sets nothing; CR2 is loaded at delivery), EPT violation, EPT misconfiguration.
    #[inline]
    pub fn translate(&mut self, gva: u64, access: Access) -> Exec<(u64, bool)> {
        self.translate_as(gva, access, self.cpl == 3, false)
    }

    /// Translate as a user or supervisor access; `implicit`: descriptor tables and the like,
    /// which are supervisor accesses at any CPL.
    ///
    /// # Errors
    /// As [`Core::translate`].
    pub fn translate_as(
        &mut self,
        gva: u64,
        access: Access,
        user: bool,
        implicit: bool,
    ) -> Exec<(u64, bool)> {
        let vpn = gva >> 12;
        let intent = self.intent(access, user, implicit);
        let is_fetch = access == Access::Fetch;
        let entry = if is_fetch { self.tlb.lookup_fetch(vpn) } else { self.tlb.lookup(vpn) };
        if let Some(e) = entry.filter(|e| self.permits(e, intent)) {
            return Ok((e.hpa | (gva & PAGE_OFFSET), e.perm & perm::SPECIAL != 0));
        }
        if is_fetch {
            self.counts.itlb_misses += 1;
        } else {
            self.counts.tlb_misses += 1;
        }
        let space = self.space();
        let mem = self.mem.clone();
        let asn = self.tlb.asn;
        let (page_log, keys) = (self.page_log(), self.keys());
        let own = Walker::own(&mem, &mut self.counts, &mut self.tlb.caches, asn);
        let mut walker = Walker { page_log, keys, ..own };
        let w = match walker.walk(&space, gva, intent) {
            Ok(w) => w,
            Err(refusal) => {
                // Faults and EPT violations invalidate, too: what is refused now stays refused.
                self.tlb.drop_page(vpn);
                self.drop_cached(&space, gva, refusal);
                return Err(Self::refused(refusal, gva));
            }
        };
        let mut p = u16::from(w.key) << perm::KEY_SHIFT;
        for (on, bit) in [
            (w.user, perm::US),
            (w.write, perm::RW),
            (w.execute, perm::X),
            (w.dirty, perm::DIRTY),
            (w.global, perm::GLOBAL),
            (self.is_special(w.hpa), perm::SPECIAL),
        ] {
            if on {
                p |= bit;
            }
        }
        let page = w.hpa & !PAGE_OFFSET;
        if is_fetch {
            self.tlb.insert_fetch(vpn, page, p, w.page_shift);
        } else {
            self.tlb.insert(vpn, page, p, w.page_shift);
        }
        Ok((w.hpa, p & perm::SPECIAL != 0))
    }

    /// A guest-physical address to a host-physical one, for the processor's own use
    /// (PDPTEs, VMX structures under nesting).
    ///
    /// # Errors
    /// EPT violation or misconfiguration.
    pub fn translate_physical(&mut self, gpa: u64, access: Access) -> Exec<u64> {
        let space = self.space();
        let mem = self.mem.clone();
        let asn = self.tlb.asn;
        let page_log = self.page_log();
        let own = Walker::own(&mem, &mut self.counts, &mut self.tlb.caches, asn);
        let mut walker = Walker { page_log, ..own };
        walker.physical(&space, gpa & PHYS_MASK, access).map_err(|r| Self::refused(r, 0))
    }

    /// What the walker's caches must forget because of a fault.
    fn drop_cached(&mut self, space: &Space, gva: u64, refusal: Refusal) {
        let caches = &mut self.tlb.caches;
        if let Some(format) = format_of(space) {
            caches.drop_address(&[self.tlb.asn], gva, &[format]);
        }
        match refusal {
            Refusal::EptViolation { gpa, .. } | Refusal::EptMisconfig { gpa } => {
                caches.drop_mapping(space.eptp, gpa);
            }
            Refusal::PageFault(_) | Refusal::LogFull => {}
        }
    }

    fn refused(r: Refusal, gva: u64) -> Trap {
        match r {
            Refusal::PageFault(code) => Trap::Exception(Exception::page_fault(gva, code)),
            Refusal::EptViolation { gpa, qualification } => Trap::Exit(Box::new(Exit {
                gpa,
                gla: gva,
                ..Exit::new(reason::EPT_VIOLATION, qualification)
            })),
            Refusal::EptMisconfig { gpa } => {
                Trap::Exit(Box::new(Exit { gpa, gla: gva, ..Exit::new(reason::EPT_MISCONFIG, 0) }))
            }
            Refusal::LogFull => Trap::Exit(Box::new(Exit::new(reason::PML_FULL, 0))),
        }
    }

    /// The host-physical address behind a linear one, without side effects.
    #[must_use]
    pub fn peek(&self, gva: u64) -> Option<u64> {
        let intent = Intent { access: Access::Read, user: false, smap: false };
        Walker::observer(&self.mem).walk(&self.space(), gva, intent).ok().map(|w| w.hpa)
    }
}
