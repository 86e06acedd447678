//! The page walk: guest dimension and host dimension (EPT), every reference counted.
//!
//! One walker for all formats; the same code serves the processor (with side effects: accessed
//! and dirty flags, counters) and observers (without).

use crate::addr::{FRAME_BYTES, PAGE_OFFSET, PHYS_MASK};
use crate::arch::bits::{cr0, cr4, efer, ept, pte};
use crate::arch::exception::pf;
use crate::cpu::state::Counts;
use crate::mem::Memory;
use crate::mmu::caches::{Caches, Mapping, Table};
use crate::mmu::format::{self, Format};
use crate::mmu::page_log::PageLog;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (or read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Everything that decides how a linear address is translated.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// CR0 (PG, WP).
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4 (PAE, PSE, PGE, SMEP, SMAP).
    pub cr4: u64,
    /// IA32_EFER (LMA, NXE).
    pub efer: u64,
    /// The PAE PDPTE registers.
    pub pdpte: [u64; 4],
    /// EPT pointer, 0 without EPT.
    pub eptp: u64,
    /// "Mode-based execute control for EPT".
    pub by_mode: bool,
}

impl Space {
    /// The bits of an entry of the EPT that are rights, and make it present.
    fn rights(&self) -> u64 {
        ept::R | ept::W | ept::X | if self.by_mode { ept::XU } else { 0 }
    }

    /// The right that a fetch from a user-mode or supervisor-mode linear address needs.
    fn execute(&self, user: bool) -> u64 {
        if user && self.by_mode { ept::XU } else { ept::X }
    }

    /// Rights as the exit qualification of an EPT violation shows them.
    fn shown(&self, rights: u64) -> u64 {
        (rights & 7) << 3 | if self.by_mode && rights & ept::XU != 0 { 1 << 6 } else { 0 }
    }
}

/// What a guest-physical address is translated for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    /// No linear address.
    Itself,
    /// A table, on the way to the translation of a linear address.
    Table,
    /// What a linear address leads to: one that is user-mode if all the guest's entries say so, or
    /// there are none.
    Page { user: bool },
}

/// Who accesses and how, as far as permissions go.
#[derive(Clone, Copy, Debug)]
pub struct Intent {
    /// Read, write, fetch.
    pub access: Access,
    /// A user-mode access.
    pub user: bool,
    /// Supervisor data accesses to user pages fault (SMAP armed, or implicit access under SMAP).
    pub smap: bool,
}

/// The rights that protection keys leave, two bits a key (SDM 3A, "Protection Keys"): 0 refuses
/// nothing, and so does what is not in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Keys {
    /// PKRU: for user pages.
    pub user: u32,
    /// IA32_PKRS: for supervisor pages.
    pub supervisor: u32,
}

impl Keys {
    /// Whether a page's key refuses an access; `heeds_writes`: of a user, or under CR0.WP.
    #[must_use]
    pub fn refuses(&self, key: u8, page_is_user: bool, access: Access, heeds_writes: bool) -> bool {
        let rights = if page_is_user { self.user } else { self.supervisor } >> (2 * key);
        match access {
            Access::Fetch => false,
            Access::Read => rights & 1 != 0,
            Access::Write => rights & 1 != 0 || rights & 2 != 0 && heeds_writes,
        }
    }
}

/// One reference of a walk, for observers: (is host dimension, level, address, entry).
pub type Reference = (bool, u8, u64, u64);

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Guest-physical address.
    pub gpa: u64,
    /// Host-physical address.
    pub hpa: u64,
    /// log2 of the page size over which gva -> hpa is linear (the smaller of both dimensions).
    pub shift: u8,
    /// log2 of the size of the guest's own page (12 when its paging is off).
    pub page_shift: u8,
    /// U/S, R/W combined over the levels.
    pub user: bool,
    /// R/W combined over the levels.
    pub write: bool,
    /// Neither XD nor a missing EPT execute right.
    pub execute: bool,
    /// The G flag, where it counts.
    pub global: bool,
    /// Dirty flags set and the EPT allows writes: a later write needs no walk.
    pub dirty: bool,
    /// The protection key; 0 where the format has none.
    pub key: u8,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// #PF with this error code.
    PageFault(u32),
    /// EPT violation at a guest-physical address, with the exit qualification
    /// (bits 7 and 8 included).
    EptViolation {
        /// Where.
        gpa: u64,
        /// SDM 3C, "Exit Qualification for EPT Violations".
        qualification: u64,
    },
    /// EPT misconfiguration at a guest-physical address.
    EptMisconfig {
        /// Where.
        gpa: u64,
    },
    /// Accessed or dirty flags would have to be set, and the page-modification log is full.
    LogFull,
}

/// Why a walk ended early.
enum End {
    /// For good.
    Refused(Refusal),
    /// Another processor changed an entry that was used: begin again.
    Changed,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        End::Refused(refusal)
    }
}

/// A walker: memory, and what to do beside translating.
pub struct Walker<'a> {
    /// Where the tables are.
    pub mem: &'a Memory,
    /// Count references here, and set accessed and dirty flags: the processor's own walks.
    pub counts: Option<&'a mut Counts>,
    /// List references here.
    pub log: Option<&'a mut Vec<Reference>>,
    /// Shorten walks by these, under this address-space number: the processor's own walks.
    pub caches: Option<(&'a mut Caches, u32)>,
    /// Note here which pages of the EPT become dirty.
    pub page_log: Option<PageLog>,
    /// Refuse what these do.
    pub keys: Keys,
}

struct HostPage {
    hpa: u64,
    shift: u8,
    rights: u64,
    dirty: bool,
}

/// The format that control registers select; `None` when paging is off.
#[must_use]
pub fn format_of(s: &Space) -> Option<&'static Format> {
    if s.cr0 & cr0::PG == 0 {
        None
    } else if s.efer & efer::LMA != 0 {
        Some(if s.cr4 & cr4::LA57 != 0 { &format::LEVEL5 } else { &format::LEVEL4 })
    } else if s.cr4 & cr4::PAE != 0 {
        Some(&format::PAE)
    } else {
        Some(&format::IA32)
    }
}

impl<'a> Walker<'a> {
    /// The processor's own: sets flags, counts, uses the translation caches.
    pub fn own(mem: &'a Memory, counts: &'a mut Counts, caches: &'a mut Caches, asn: u32) -> Self {
        Self {
            mem,
            counts: Some(counts),
            log: None,
            caches: Some((caches, asn)),
            page_log: None,
            keys: Keys::default(),
        }
    }

    /// An observer's: without effects.
    #[must_use]
    pub fn observer(mem: &'a Memory) -> Self {
        Self { mem, counts: None, log: None, caches: None, page_log: None, keys: Keys::default() }
    }

    fn note(&mut self, host: bool, level: u8, address: u64, entry: u64) {
        if let Some(c) = &mut self.counts {
            let t = if host { &mut c.walk_host } else { &mut c.walk_guest };
            t[usize::from(level)] += 1;
        }
        if let Some(l) = &mut self.log {
            l.push((host, level, address, entry));
        }
    }

    fn has_effects(&self) -> bool {
        self.counts.is_some()
    }

    /// Set flag bits in an entry, atomically, if but for such flags (`all`) it still is what was read.
    fn set_flags(&self, hpa: u64, size: usize, seen: u64, bits: u64, all: u64) -> Result<(), End> {
        if !self.has_effects() || seen & bits == bits {
            return Ok(());
        }
        let is_same = |old| (old ^ seen) & !all == 0;
        let old = self.mem.update(hpa, size, |old| if is_same(old) { old | bits } else { old });
        self.mem.wrote(hpa, size as u64);
        if is_same(old) { Ok(()) } else { Err(End::Changed) }
    }

    /// Set flags in an entry of the EPT that translates `gpa`; a page that becomes dirty is logged.
    /// False: the log is full, so nothing may be set.
    #[inline]
    fn set_host_flags(&self, hpa: u64, seen: u64, bits: u64, gpa: u64) -> Result<bool, End> {
        if !self.has_effects() || seen & bits == bits {
            return Ok(true);
        }
        self.add_host_flags(hpa, seen, bits, gpa)
    }

    #[cold]
    fn add_host_flags(&self, hpa: u64, seen: u64, bits: u64, gpa: u64) -> Result<bool, End> {
        if let Some(log) = self.page_log {
            if log.is_full(self.mem) {
                return Ok(false);
            }
            if bits & !seen & ept::D != 0 {
                log.note(self.mem, gpa);
            }
        }
        self.set_flags(hpa, 8, seen, bits, ept::A | ept::D)?;
        Ok(true)
    }

    /// Set accessed and dirty flags in a guest's entry at `gpa`: a read and a write, which the EPT
    /// may refuse.
    fn set_guest_flags(
        &self,
        s: &Space,
        place: &HostPage,
        gpa: u64,
        size: usize,
        seen: u64,
        bits: u64,
    ) -> Result<(), End> {
        if self.has_effects() && seen & bits != bits && place.rights & ept::W == 0 {
            let qualification = 3 | s.shown(place.rights) | 1 << 7;
            return Err(Refusal::EptViolation { gpa, qualification }.into());
        }
        self.set_flags(place.hpa, size, seen, bits, pte::A | pte::D)
    }

    /// Translate a linear address.
    ///
    /// # Errors
    /// What the processor would raise.
    pub fn walk(&mut self, s: &Space, gva: u64, intent: Intent) -> Result<Walked, Refusal> {
        until_unchanged(|| self.attempt(s, gva, intent))
    }

    fn attempt(&mut self, s: &Space, gva: u64, intent: Intent) -> Result<Walked, End> {
        let Some(format) = format_of(s) else {
            let host = self.host(s, gva & PHYS_MASK, intent.access, For::Page { user: true })?;
            return Ok(Walked {
                gpa: gva & PHYS_MASK,
                hpa: host.hpa,
                shift: host.shift,
                page_shift: 12,
                user: true,
                write: true,
                execute: host.rights & s.execute(true) != 0,
                global: false,
                dirty: host.rights & ept::W != 0 && host.dirty,
                key: 0,
            });
        };
        let is_long = s.efer & efer::LMA != 0;
        let nx = s.efer & efer::NXE != 0 && format.entry_bytes == 8;
        let code = |present: u32| {
            let fetch = intent.access == Access::Fetch && (nx || s.cr4 & cr4::SMEP != 0);
            present
                | if intent.access == Access::Write { pf::W } else { 0 }
                | if intent.user { pf::U } else { 0 }
                | if fetch { pf::I } else { 0 }
        };
        let mut table = if format.is_pae {
            let pdpte = s.pdpte[(gva >> 30 & 3) as usize];
            if pdpte & pte::P == 0 {
                return Err(Refusal::PageFault(code(0)).into());
            }
            pdpte & PHYS_MASK & !PAGE_OFFSET
        } else if is_long {
            s.cr3 & PHYS_MASK & !PAGE_OFFSET
        } else {
            s.cr3 & 0xFFFF_F000
        };
        let size = usize::from(format.entry_bytes);
        let (mut user, mut write, mut execute) = (true, true, true);
        let (mut unmarked, mut tables) = (Vec::new(), Vec::new()); // seldom more than nothing
        let keeps_tables = self.caches.as_ref().is_some_and(|(caches, _)| caches.has_structures());
        let (first, mut known) = self.known_table(format, gva);
        if let Some(t) = known {
            (table, user, write, execute) = (t.gpa, t.user, t.write, t.execute);
        }
        for level in format.levels.iter().skip(first) {
            let index = gva >> level.shift & ((1 << level.bits) - 1);
            let at = table + index * size as u64;
            // A table access counts as a write for the EPT when its accessed/dirty flags are on.
            let as_write = s.eptp & ept::EPTP_AD != 0 && self.has_effects();
            let how = if as_write { Access::Write } else { Access::Read };
            let place = if let Some(t) = known.take() {
                HostPage { hpa: t.hpa | (at & PAGE_OFFSET), shift: 12, rights: t.rights, dirty: true }
            } else {
                self.host(s, at, how, For::Table)?
            };
            let hpa = place.hpa & !PAGE_OFFSET;
            if keeps_tables {
                tables.push(Table { gpa: table, hpa, rights: place.rights, user, write, execute });
            }
            let entry = self.mem.load(place.hpa, size);
            self.note(false, level.number, place.hpa, entry);
            if entry & pte::P == 0 {
                return Err(Refusal::PageFault(code(0)).into());
            }
            let is_page = level.number == 1
                || (level.may_map && entry & pte::PS != 0 && (size == 8 || s.cr4 & cr4::PSE != 0));
            if entry & self.reserved(s, format, level.number, level.shift, is_page, nx) != 0 {
                return Err(Refusal::PageFault(code(pf::P) | pf::RSVD).into());
            }
            user &= entry & pte::US != 0;
            write &= entry & pte::RW != 0;
            execute &= !nx || entry & pte::XD == 0;
            if !is_page {
                if entry & pte::A == 0 {
                    unmarked.push((place, at, entry));
                }
                table = entry & PHYS_MASK & !PAGE_OFFSET & if size == 4 { 0xFFFF_F000 } else { !0 };
                continue;
            }
            let allowed = match (intent.access, intent.user) {
                (Access::Read, true) => user,
                (Access::Write, true) => user && write,
                (Access::Fetch, true) => user && execute,
                (Access::Read, false) => !(user && intent.smap),
                (Access::Write, false) => !(user && intent.smap) && (write || s.cr0 & cr0::WP == 0),
                (Access::Fetch, false) => execute && !(user && s.cr4 & cr4::SMEP != 0),
            };
            let key = if is_long { (entry >> 59) as u8 & 0xF } else { 0 };
            let heeds_writes = intent.user || s.cr0 & cr0::WP != 0;
            let by_key = self.keys.refuses(key, user, intent.access, heeds_writes);
            if !allowed || by_key {
                let by_key = if by_key { pf::PK } else { 0 };
                return Err(Refusal::PageFault(code(pf::P) | by_key).into());
            }
            let mask = (1_u64 << level.shift) - 1;
            let frame = if size == 4 && level.number == 2 {
                (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32
            } else {
                entry & PHYS_MASK & !PAGE_OFFSET & !mask & if size == 4 { 0xFFFF_F000 } else { !0 }
            };
            let gpa = frame | (gva & mask);
            // Only a walk that leads to a translation uses its entries (decision 0034).
            for (place, at, entry) in unmarked {
                self.set_guest_flags(s, &place, at, size, entry, pte::A)?;
            }
            let wants = pte::A | if intent.access == Access::Write { pte::D } else { 0 };
            self.set_guest_flags(s, &place, at, size, entry, wants)?;
            self.note_tables(format, gva, first, &tables);
            let host = self.host(s, gpa, intent.access, For::Page { user })?;
            return Ok(Walked {
                gpa,
                hpa: host.hpa,
                shift: level.shift.min(host.shift),
                page_shift: level.shift,
                user,
                write,
                execute: execute && host.rights & s.execute(user) != 0,
                global: entry & pte::G != 0 && s.cr4 & cr4::PGE != 0,
                dirty: (entry | wants) & pte::D != 0 && host.rights & ept::W != 0 && host.dirty,
                key,
            });
        }
        unreachable!("the last level of every format maps a page")
    }

    /// Keep the tables that a walk from level `first` on went through.
    fn note_tables(&mut self, format: &Format, gva: u64, first: usize, tables: &[Table]) {
        let Some((caches, asn)) = &mut self.caches else { return };
        for (table, above) in tables.iter().skip(1).zip(&format.levels[first..]) {
            caches.note_table(*asn, above.number, above.shift, gva, *table);
        }
    }

    /// How many levels of the guest's tables a walk may leave out, and the table to begin with.
    fn known_table(&mut self, format: &Format, gva: u64) -> (usize, Option<Table>) {
        let Some((caches, asn)) = self.caches.as_mut().filter(|(c, _)| c.has_structures()) else {
            return (0, None);
        };
        for n in (1..format.levels.len()).rev() {
            let above = &format.levels[n - 1];
            if let Some(table) = caches.table(*asn, above.number, above.shift, gva) {
                if let Some(c) = &mut self.counts {
                    c.structure_hits[usize::from(above.number)] += 1;
                }
                return (n, Some(table));
            }
        }
        if let Some(c) = &mut self.counts {
            c.structure_misses += 1;
        }
        (0, None)
    }

    /// The EPT's page that the nested TLB knows for an address, if an access may go on with it.
    fn known_page(&mut self, s: &Space, gpa: u64, wanted: u64, is_write: bool) -> Option<HostPage> {
        let (caches, _) = self.caches.as_mut().filter(|(c, _)| c.has_nested())?;
        let found = caches
            .mapping(s.eptp, gpa)
            .filter(|(m, _)| wanted & !m.rights == 0 && (m.dirty || !is_write))
            .map(|(m, shift)| {
                let offset = gpa & ((1 << shift) - 1);
                HostPage { hpa: m.hpa | offset, shift, rights: m.rights, dirty: m.dirty }
            });
        if let Some(c) = &mut self.counts {
            *(if found.is_some() { &mut c.nested_hits } else { &mut c.nested_misses }) += 1;
        }
        found
    }

    fn reserved(&self, s: &Space, format: &Format, number: u8, shift: u8, is_page: bool, nx: bool) -> u64 {
        if format.entry_bytes == 4 {
            // PSE-36: bits 20:13 are address bits above 32, 21 is reserved.
            return if number == 2 && is_page { 1 << 21 } else { 0 };
        }
        let high = if s.efer & efer::LMA != 0 { 0x000F_FFFF_FFFF_F000 } else { 0x7FFF_FFFF_FFFF_F000 };
        let mut bits = high & !PHYS_MASK;
        if !nx {
            bits |= pte::XD;
        }
        if is_page && number > 1 {
            bits |= ((1 << shift) - 1) & !0x1FFF; // address bits below the page, but PAT (12)
        }
        if number >= 4 {
            bits |= pte::PS;
        }
        bits
    }

    /// Translate a guest-physical address.
    fn host(&mut self, s: &Space, gpa: u64, access: Access, what: For) -> Result<HostPage, End> {
        let mut rights = s.rights();
        if s.eptp == 0 {
            return Ok(HostPage { hpa: gpa, shift: 63, rights, dirty: true });
        }
        let with_ad = s.eptp & ept::EPTP_AD != 0;
        let mut table = s.eptp & PHYS_MASK & !PAGE_OFFSET;
        let mut may_set = true;
        let wanted = match access {
            Access::Read => ept::R,
            Access::Write => ept::R | ept::W,
            Access::Fetch => s.execute(what == For::Page { user: true }),
        };
        if let Some(page) = self.known_page(s, gpa, wanted, access == Access::Write) {
            return Ok(page);
        }
        let format = if s.eptp >> 3 & 7 == 4 { &format::EPT5 } else { &format::EPT };
        for level in format.levels {
            let at = table + (gpa >> level.shift & 511) * 8;
            let entry = self.mem.load(at, 8);
            self.note(true, level.number, at, entry);
            let bits = entry & s.rights();
            rights &= bits;
            let is_page = level.number == 1 || (level.may_map && entry & ept::LARGE != 0);
            if bits != 0 && is_misconfigured(entry, level.number, level.shift, is_page) {
                return Err(Refusal::EptMisconfig { gpa }.into());
            }
            if bits == 0 || (is_page && wanted & !rights != 0) {
                let q = match access {
                    Access::Read => 1,
                    Access::Write if matches!(what, For::Page { .. }) => 2,
                    Access::Write => 3,
                    Access::Fetch => 4,
                };
                let rights = if bits == 0 { 0 } else { rights };
                let address = match what {
                    For::Itself => 0,
                    For::Table => 1 << 7,
                    For::Page { .. } => 3 << 7,
                };
                let qualification = q | s.shown(rights) | address;
                return Err(Refusal::EptViolation { gpa, qualification }.into());
            }
            if !is_page {
                if with_ad {
                    may_set &= self.set_host_flags(at, entry, ept::A, gpa)?;
                }
                table = entry & PHYS_MASK & !PAGE_OFFSET;
                continue;
            }
            let flags = ept::A | if access == Access::Write { ept::D } else { 0 };
            if with_ad && !(may_set && self.set_host_flags(at, entry, flags, gpa)?) {
                return Err(Refusal::LogFull.into());
            }
            let mask = (1_u64 << level.shift) - 1;
            let hpa = entry & PHYS_MASK & !mask & !PAGE_OFFSET;
            let dirty = !with_ad || (entry | flags) & ept::D != 0;
            if let Some((caches, _)) = self.caches.as_mut().filter(|(c, _)| c.has_nested()) {
                caches.note_mapping(s.eptp, gpa, level.shift, Mapping { hpa, rights, dirty });
            }
            return Ok(HostPage { hpa: hpa | (gpa & mask), shift: level.shift, rights, dirty });
        }
        unreachable!("level 1 maps a page")
    }

    /// Translate a guest-physical address alone (PDPTE loads, observers).
    ///
    /// # Errors
    /// EPT violation or misconfiguration.
    pub fn physical(&mut self, s: &Space, gpa: u64, access: Access) -> Result<u64, Refusal> {
        until_unchanged(|| self.host(s, gpa, access, For::Itself)).map(|p| p.hpa)
    }
}

/// Try until nobody changes an entry between its being read and its flags being set.
fn until_unchanged<T>(mut attempt: impl FnMut() -> Result<T, End>) -> Result<T, Refusal> {
    loop {
        match attempt() {
            Ok(found) => return Ok(found),
            Err(End::Refused(refusal)) => return Err(refusal),
            Err(End::Changed) => {}
        }
    }
}

/// SDM 3C, "EPT Misconfigurations".
fn is_misconfigured(entry: u64, number: u8, shift: u8, is_page: bool) -> bool {
    let rights = entry & 7;
    if rights == ept::W || rights == ept::W | ept::X {
        return true;
    }
    let mut reserved = 0x000F_FFFF_FFFF_F000 & !PHYS_MASK;
    if is_page {
        if matches!(entry >> 3 & 7, 2 | 3 | 7) {
            return true;
        }
        reserved |= ((1 << shift) - 1) & !(FRAME_BYTES - 1);
    } else {
        reserved |= 0x78; // bits 6:3
        if number >= 4 {
            reserved |= ept::LARGE;
        }
    }
    entry & reserved != 0
}
