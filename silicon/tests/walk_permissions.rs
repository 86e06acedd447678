//! Permissions: all combinations of the bits that decide, counted through, against an oracle that
//! is the manual's prose (SDM 3A, "Access Rights" and "Page-Fault Exceptions"; SDM 3C, "EPT
//! Violations" and "EPT Misconfigurations").

use silicon::arch::exit::reason;
use silicon::cpu::state::{Clock, Counts};
use silicon::cpu::trap::Trap;
use silicon::dbt::home::Home;
use silicon::mem::Memory;
use silicon::mmu::walk::{Access, Intent, Refusal, Space, Walker};

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const XD: u64 = 1 << 63;
const PG: u64 = 1 << 31;
const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const NXE: u64 = 1 << 11;
const LONG: u64 = 0x500;
const TABLES: u64 = 0x10000;
const PAGE: u64 = 0x40_0000;
const GVA: u64 = 0x2468_1357_9ABC & !0xFFF | 0x123;
const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];

/// Bit `n` of a counter.
fn bit(k: u32, n: u32) -> bool {
    k >> n & 1 != 0
}

/// What a leaf with these rights allows.
fn is_allowed(s: &Space, i: Intent, user: bool, write: bool, execute: bool) -> bool {
    match i.access {
        Access::Fetch if i.user => user && execute,
        Access::Fetch => execute && (!user || s.cr4 & SMEP == 0),
        Access::Read if i.user => user,
        Access::Read => !user || !i.smap,
        Access::Write if i.user => user && write,
        Access::Write if user && i.smap => false,
        Access::Write => write || s.cr0 & WP == 0,
    }
}

/// The page-fault error code but for P and RSVD.
fn error_code(s: &Space, i: Intent) -> u32 {
    let shows_fetch = s.cr4 & SMEP != 0 || s.cr4 & PAE != 0 && s.efer & NXE != 0;
    u32::from(i.access == Access::Write) << 1
        | u32::from(i.user) << 2
        | u32::from(i.access == Access::Fetch && shows_fetch) << 4
}

/// The outcome of a walk over these entries without EPT: `None`, or the error code.
fn oracle(s: &Space, i: Intent, entries: &[u64]) -> Option<u32> {
    let code = error_code(s, i);
    for e in entries {
        if e & P == 0 {
            return Some(code);
        }
        if e & XD != 0 && s.efer & NXE == 0 {
            return Some(code | 1 | 8);
        }
    }
    let all = |b: u64| entries.iter().all(|e| e & b != 0);
    let execute = entries.iter().all(|e| e & XD == 0);
    if is_allowed(s, i, all(US), all(RW), execute) { None } else { Some(code | 1) }
}

fn space(k: u32, eptp: u64) -> Space {
    let on = |n: u32, b: u64| if bit(k, n) { b } else { 0 };
    Space {
        cr0: 1 | PG | on(0, WP),
        cr3: TABLES,
        cr4: PAE | on(1, SMEP),
        efer: LONG | on(2, NXE),
        pdpte: [0; 4],
        eptp,
        by_mode: false,
    }
}

fn intents() -> impl Iterator<Item = Intent> {
    (0..12).map(|k| Intent { access: ACCESSES[k % 3], user: k / 3 % 2 == 1, smap: k / 6 == 1 })
}

/// Where the entry of a 4-level walk of `GVA` is at each step, tables in consecutive frames.
fn place(step: u64) -> u64 {
    TABLES + step * 0x1000 + (GVA >> (39 - 9 * step)) % 512 * 8
}

fn entry_of(k: u32) -> u64 {
    u64::from(k & 7) | if bit(k, 3) { XD } else { 0 }
}

#[test]
fn all_rights_at_all_levels_under_all_modes() {
    let mem = Memory::new(16 << 20).unwrap();
    let mut outcomes = [0_u64; 32];
    for levels in [2_u64, 3, 4] {
        for k in 0..1 << (4 * levels) {
            let mut entries = Vec::new();
            for n in 0..levels {
                let is_leaf = n == levels - 1;
                let target = if is_leaf { 0 } else { TABLES + (n + 1) * 0x1000 };
                let e = entry_of(k >> (4 * n) & 15);
                entries.push(e);
                mem.store(place(n), 8, e | target | if is_leaf && n < 3 { PS } else { 0 });
            }
            for mode in 0..8 {
                let s = space(mode, 0);
                for i in intents() {
                    let mut walker = Walker::observer(&mem);
                    let got = match walker.walk(&s, GVA, i) {
                        Ok(_) => None,
                        Err(Refusal::PageFault(code)) => Some(code),
                        Err(other) => panic!("{other:?}"),
                    };
                    let want = oracle(&s, i, &entries);
                    assert_eq!(want, got, "{entries:x?} {i:?} {s:x?}");
                    outcomes[want.unwrap_or(31) as usize] += 1;
                }
            }
        }
    }
    // Every error code that there is came: P, W, U, RSVD, I.
    let seen: Vec<usize> = (0..32).filter(|&c| outcomes[c] > 0).collect();
    assert_eq!([0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 16, 17, 20, 21, 25, 29, 31], seen[..]);
}

#[test]
fn what_the_tlb_allows_is_what_a_walk_would() {
    let mem = Memory::new(16 << 20).unwrap();
    let mut core = Home::new(mem.clone(), Clock::Virtual, 0).unwrap();
    for n in 0..3 {
        mem.store(place(n), 8, (TABLES + (n + 1) * 0x1000) | P | RW | US);
    }
    let users = [(3, false), (0, false), (3, true), (0, true)]; // CPL, implicit
    for k in 0..1 << 8 {
        let leaf = P | entry_of(k << 1 & 15) & !P | PAGE;
        let s = Space {
            cr4: PAE | if bit(k, 4) { SMEP } else { 0 } | if bit(k, 3) { SMAP } else { 0 },
            ..space(k >> 5, 0)
        };
        (core.cr0, core.cr3, core.efer) = (s.cr0, s.cr3, s.efer);
        core.cr4 = s.cr4 | if k >> 5 & 2 != 0 { SMEP } else { 0 };
        core.refresh();
        for order in 0..(24 * 24) {
            mem.store(place(3), 8, leaf);
            core.flush_guest();
            for turn in [order / 24, order % 24] {
                let (access, (cpl, implicit), ac) = (ACCESSES[turn % 3], users[turn / 3 % 4], turn / 12 == 1);
                core.cpl = cpl;
                core.rflags = 2 | if ac { 1 << 18 } else { 0 };
                let user = cpl == 3 && !implicit;
                // Lifted by AC for explicit accesses only.
                let smap = core.cr4 & SMAP != 0 && (implicit || !ac);
                let want = oracle(&core.space(), Intent { access, user, smap }, &[leaf]);
                let got = match core.translate_as(GVA, access, user, implicit) {
                    Ok((hpa, false)) => {
                        assert_eq!(PAGE | GVA & 0xFFF, hpa);
                        None
                    }
                    Err(Trap::Exception(e)) => e.error,
                    other => panic!("{other:?}"),
                };
                assert_eq!(
                    want, got,
                    "leaf {leaf:x} cpl {cpl} implicit {implicit} ac {ac} {access:?} {s:x?}"
                );
                if want.is_none() {
                    let flags = A | if access == Access::Write { D } else { 0 };
                    assert_eq!(flags, mem.load(place(3), 8) & flags);
                }
            }
        }
    }
}

#[test]
fn reserved_bits_of_every_format_and_level() {
    let mem = Memory::new(16 << 20).unwrap();
    // Format, its mode, the steps (shift, may map), entry bytes.
    type Row = (&'static str, u64, u64, &'static [(u8, bool)], u64);
    let rows: [Row; 3] = [
        ("IA-32", PSE, 0, &[(22, true), (12, false)], 4),
        ("PAE", PAE, 0, &[(21, true), (12, false)], 8),
        ("Intel 64", PAE, LONG, &[(39, false), (30, true), (21, true), (12, false)], 8),
    ];
    for (name, cr4, efer, steps, size) in rows {
        for (step, large, nxe, b) in (0..steps.len() as u32 * 2 * 2 * 64)
            .map(|k| ((k >> 8) as usize, bit(k, 7), bit(k, 6), k & 63))
            .filter(|c| u64::from(c.3) < size * 8)
        {
            let (shift, may_map) = steps[step];
            if large && !may_map || b < 3 || b == 7 && may_map {
                continue;
            }
            let index_bits = if size == 4 { 10 } else { 9 };
            let place =
                |n: usize| TABLES + n as u64 * 0x1000 + (GVA >> steps[n].0 & ((1 << index_bits) - 1)) * size;
            for n in 0..steps.len() {
                let ps = if n == step && large { PS } else { 0 };
                mem.store(
                    place(n),
                    size as usize,
                    (TABLES + (n as u64 + 1) * 0x1000) & if ps != 0 { 0 } else { !0 } | 7 | ps,
                );
            }
            mem.store(place(step), size as usize, mem.load(place(step), size as usize) | 1 << b);
            let s = Space {
                cr0: 1 | PG,
                cr3: TABLES,
                cr4,
                efer: efer | if nxe { NXE } else { 0 },
                pdpte: [TABLES | 1; 4],
                eptp: 0,
                by_mode: false,
            };
            let is_reserved = match (name, b) {
                ("IA-32", 21) => large,
                ("IA-32", _) => false,
                (_, 63) => !nxe,
                ("PAE", 46..=62) | (_, 46..=51) => true,
                (_, 7) => shift == 39,
                (_, 13..=29) => large && b < u32::from(shift),
                _ => false,
            };
            let i = Intent { access: Access::Read, user: true, smap: false };
            let mut log = Vec::new();
            let got = Walker { log: Some(&mut log), ..Walker::observer(&mem) }.walk(&s, GVA, i);
            let what = format!("{name} bit {b} at shift {shift}, large {large}, NXE {nxe}");
            // An entry that leads out of memory finds ones there: a fault, but of the next entry.
            let is_refused = got == Err(Refusal::PageFault(0xD)) && log.len() == step + 1;
            assert_eq!(is_reserved, is_refused, "{what}: {got:?}");
            if name == "IA-32" && large && (13..=20).contains(&b) {
                assert_eq!(Ok(1 << (b + 19) | GVA & 0x3F_FFFF), got.map(|w| w.hpa), "{what}");
            }
        }
    }
}

const EPT: u64 = 0x20000;

/// EPT: 2-MByte pages, the tables (guest-physical 0) and the data (`PAGE`) with rights of their own.
fn lay_ept(mem: &Memory, tables: u64, data: u64) {
    mem.store(EPT, 8, EPT + 0x1007);
    mem.store(EPT + 0x1000, 8, EPT + 0x2007);
    mem.store(EPT + 0x2000, 8, tables | 0xB0);
    mem.store(EPT + 0x2000 + PAGE / 0x20_0000 * 8, 8, PAGE | data | 0xB0);
}

/// The outcome under EPT: the error code, or the guest-physical address and the qualification (a
/// misconfiguration has none).
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Works,
    Fault(u32),
    Violation(u64, u64),
    Misconfigured(u64),
}

fn ept_use(gpa: u64, rights: u64, how: u64, is_table: bool) -> Option<Outcome> {
    if rights & 3 == 2 {
        return Some(Outcome::Misconfigured(gpa));
    }
    let needs = if how & 2 != 0 { 3 } else { how };
    let qualification = how | rights << 3 | 1 << 7 | u64::from(!is_table) << 8;
    (needs & !rights != 0).then_some(Outcome::Violation(gpa, qualification))
}

fn oracle_with_ept(s: &Space, i: Intent, entries: &[u64], tables: u64, data: u64) -> Outcome {
    let has_ad = s.eptp & 0x40 != 0;
    for n in 0..entries.len() {
        // With accessed and dirty flags for EPT, using an entry counts as a read and a write.
        if let Some(o) = ept_use(place(n as u64), tables, if has_ad { 3 } else { 1 }, true) {
            return o;
        }
        let is_leaf = n == 3;
        if is_leaf {
            let all = |b: u64| entries.iter().all(|e| e & b != 0);
            if !is_allowed(s, i, all(US), all(RW), entries.iter().all(|e| e & XD == 0)) {
                return Outcome::Fault(error_code(s, i) | 1);
            }
        }
    }
    // A walk that leads to a translation sets flags, from the root down: a read and a write.
    for (n, e) in entries.iter().enumerate() {
        let wants = A | if n == 3 && i.access == Access::Write { D } else { 0 };
        if e & wants != wants && tables & 2 == 0 {
            return Outcome::Violation(place(n as u64), 3 | tables << 3 | 1 << 7);
        }
    }
    let how = [1, 2, 4][ACCESSES.iter().position(|&a| a == i.access).unwrap()];
    ept_use(PAGE | GVA & 0xFFF, data, how, false).unwrap_or(Outcome::Works)
}

#[test]
fn ept_rights_of_tables_and_data_and_accessed_flags() {
    let mem = Memory::new(16 << 20).unwrap();
    let mut kinds = [0; 4];
    for k in 0..1_u32 << 14 {
        let (tables, data) = (u64::from(k & 7), u64::from(k >> 3 & 7));
        lay_ept(&mem, tables, data);
        let eptp = EPT | 0x1E | if bit(k, 6) { 0x40 } else { 0 };
        let preset = [0, A, A | D, D][(k >> 7 & 3) as usize];
        let leaf = P | u64::from(k >> 9 & 3) << 1 | if bit(k, 11) { XD } else { 0 };
        let s = Space { efer: LONG | NXE, ..space(k >> 12, eptp) };
        for i in intents() {
            let mut entries: Vec<u64> =
                (1..4).map(|n| (TABLES + n * 0x1000) | P | RW | US | preset & A).collect();
            entries.push(leaf | preset | PAGE);
            for (n, &e) in entries.iter().enumerate() {
                mem.store(place(n as u64), 8, e);
            }
            let mut counts = Counts::default();
            let mut walker = Walker { counts: Some(&mut counts), ..Walker::observer(&mem) };
            let got = match walker.walk(&s, GVA, i) {
                Ok(_) => Outcome::Works,
                Err(Refusal::PageFault(code)) => Outcome::Fault(code),
                Err(Refusal::EptViolation { gpa, qualification }) => Outcome::Violation(gpa, qualification),
                Err(Refusal::LogFull) => panic!("no log is kept"),
                Err(Refusal::EptMisconfig { gpa }) => Outcome::Misconfigured(gpa),
            };
            let want = oracle_with_ept(&s, i, &entries, tables, data);
            assert_eq!(want, got, "tables {tables} data {data} leaf {leaf:x}+{preset:x} {i:?} {s:x?}");
            kinds[match want {
                Outcome::Works => 0,
                Outcome::Fault(_) => 1,
                Outcome::Violation(..) => 2,
                Outcome::Misconfigured(_) => 3,
            }] += 1;
            if tables & 2 == 0 {
                // Nothing is written through a page that the EPT does not let be written.
                assert!(entries.iter().enumerate().all(|(n, &e)| e == mem.load(place(n as u64), 8)));
            }
        }
    }
    assert!(kinds.iter().all(|&n| n > 1000), "{kinds:?}");
}

#[test]
fn ept_rights_at_every_level_are_anded() {
    let mem = Memory::new(16 << 20).unwrap();
    let gpa = 0x1234_5000_u64;
    for k in 0..1_u64 << 12 {
        let rights: Vec<u64> = (0..4).map(|n| k >> (3 * n) & 7).collect();
        for (n, &r) in rights.iter().enumerate() {
            let at = EPT + n as u64 * 0x1000 + (gpa >> (39 - 9 * n)) % 512 * 8;
            mem.store(at, 8, r | if n == 3 { PAGE | 0x30 } else { EPT + (n as u64 + 1) * 0x1000 });
        }
        let s = Space { cr0: 1, cr3: 0, cr4: 0, efer: 0, pdpte: [0; 4], eptp: EPT | 0x1E, by_mode: false };
        for (access, how) in ACCESSES.into_iter().zip([1, 2, 4]) {
            // The first entry that ends the walk says how.
            let bad = rights.iter().find(|&&r| r == 0 || r & 3 == 2);
            let all = rights.iter().fold(7, |a, r| a & r);
            let want = match bad {
                Some(0) => Err(Refusal::EptViolation { gpa, qualification: how | 0x180 }),
                Some(_) => Err(Refusal::EptMisconfig { gpa }),
                None => match ept_use(gpa, if all & 3 == 2 { all & 4 } else { all }, how, false) {
                    Some(Outcome::Violation(gpa, qualification)) => {
                        Err(Refusal::EptViolation { gpa, qualification: qualification & !0x38 | all << 3 })
                    }
                    _ => Ok(PAGE),
                },
            };
            let intent = Intent { access, user: false, smap: false };
            let got = Walker::observer(&mem).walk(&s, gpa, intent);
            assert_eq!(want, got.map(|w| w.hpa), "{rights:?} {access:?}");
        }
    }
}

#[test]
fn refusals_become_the_exits_with_their_addresses() {
    let mem = Memory::new(16 << 20).unwrap();
    let mut core = Home::new(mem.clone(), Clock::Virtual, 0).unwrap();
    for n in 0..4 {
        mem.store(place(n), 8, if n == 3 { PAGE } else { TABLES + (n + 1) * 0x1000 } | P | RW | US);
    }
    let s = space(0, EPT | 0x1E);
    (core.cr0, core.cr3, core.cr4, core.efer, core.vmx.eptp) = (s.cr0, s.cr3, s.cr4, s.efer, s.eptp);
    for (data, why, qualification) in
        [(1, reason::EPT_VIOLATION, 2 | 1 << 3 | 0x180), (2, reason::EPT_MISCONFIG, 0)]
    {
        lay_ept(&mem, 7, data);
        core.refresh();
        core.flush_guest();
        let Err(Trap::Exit(exit)) = core.translate(GVA, Access::Write) else { panic!("no exit") };
        assert_eq!((why, qualification), (exit.reason, exit.qualification));
        assert_eq!((PAGE | GVA & 0xFFF, GVA), (exit.gpa, exit.gla));
    }
}

#[test]
fn mode_based_execute_control_asks_for_what_sort_of_linear_address_is_fetched() {
    const XU: u64 = 1 << 10;
    let mem = Memory::new(16 << 20).unwrap();
    let rights = |k: u32| u64::from(k & 7) | if bit(k, 3) { XU } else { 0 };
    let (mut seen, mut refused) = ([0; 3], 0);
    for k in 0..1_u32 << 12 {
        let (upper, last, by_mode) = (rights(k), rights(k >> 4), bit(k, 8));
        let (is_user, is_paging, access) = (bit(k, 9), bit(k, 10), ACCESSES[(k >> 11) as usize * 2]);
        lay_ept(&mem, 7 | XU, last);
        mem.store(EPT, 8, (EPT + 0x1000) | 7 | XU);
        mem.store(EPT + 0x1000, 8, (EPT + 0x2000) | upper);
        for n in 0..4 {
            let us = if is_user || n < 3 { US } else { 0 };
            mem.store(
                place(n),
                8,
                if n == 3 { PAGE } else { TABLES + (n + 1) * 0x1000 } | P | RW | us | A | D,
            );
        }
        let mut s = Space { by_mode, ..space(0, EPT | 0x1E) };
        s.cr0 = if is_paging { s.cr0 } else { 1 };
        let gva = if is_paging { GVA } else { PAGE | GVA & 0xFFF };
        // The tables of the guest are behind the same upper entry.
        let first = if is_paging { TABLES + (GVA >> 39) % 512 * 8 } else { PAGE | GVA & 0xFFF };
        let mask = if by_mode { 7 | XU } else { 7 };
        let shown = |r: u64| (r & 7) << 3 | if by_mode { (r & XU) >> 4 } else { 0 };
        let of_page = PAGE | GVA & 0xFFF;
        let how = if access == Access::Fetch { 4 } else { 1 };
        let needs = match access {
            Access::Fetch if by_mode && (is_user || !is_paging) => XU,
            Access::Fetch => 4,
            _ => 1,
        };
        let (first_how, first_kind) = if is_paging { (1, 0x80) } else { (how, 0x180) };
        let want = if upper & mask == 0 {
            Err(Refusal::EptViolation { gpa: first, qualification: first_how | first_kind })
        } else if upper & 3 == 2 {
            Err(Refusal::EptMisconfig { gpa: first })
        } else if is_paging && upper & 1 == 0 {
            Err(Refusal::EptViolation { gpa: first, qualification: 1 | shown(upper) | 0x80 })
        } else if last & mask == 0 {
            Err(Refusal::EptViolation { gpa: of_page, qualification: how | 0x180 })
        } else if last & 3 == 2 {
            Err(Refusal::EptMisconfig { gpa: of_page })
        } else if last & upper & needs == 0 {
            Err(Refusal::EptViolation { gpa: of_page, qualification: how | shown(last & upper) | 0x180 })
        } else {
            Ok(of_page)
        };
        let intent = Intent { access, user: false, smap: false };
        let got = Walker::observer(&mem).walk(&s, gva, intent);
        assert_eq!(want, got.map(|w| w.hpa), "{upper:x} {last:x} {by_mode} {is_user} {is_paging} {access:?}");
        match got {
            Ok(w) => {
                let execute = if by_mode && (is_user || !is_paging) { XU } else { 4 };
                assert_eq!(last & upper & execute != 0, w.execute);
                seen[0] += 1;
            }
            Err(Refusal::EptViolation { .. }) => seen[1] += 1,
            Err(_) => seen[2] += 1,
        }
        refused += u32::from(got.is_err() && by_mode && last & upper & 4 != 0 && last & upper & 1 != 0);
    }
    assert!(seen.iter().all(|&n| n > 100) && refused > 10, "{seen:?} {refused}");
}
