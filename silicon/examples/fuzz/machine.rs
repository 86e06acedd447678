//! The candidate: our processor, in IA-32e mode at privilege level 3, with the same pages.

use std::sync::Arc;

use silicon::arch::exception::vector;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::{Clock, Shadow};
use silicon::cpu::step::step;
use silicon::cpu::trap::Trap;
use silicon::dbt::home::Home;
use silicon::dbt::promotion::Windows;
use silicon::engine::{Engine, Reference};
use silicon::mem::Memory;
use silicon::processor::EngineKind;

use crate::case::*;

const PML4: u64 = 0x1000;
const FIRST_TABLE: u64 = 0x2000;
const CODE_HPA: u64 = 0x20_0000;
const PAGES_HPA: u64 = 0x30_0000;
/// Instructions (and pieces of repeated ones) after which a case counts as endless.
const ENOUGH: u64 = 400;

const TF: u64 = 1 << 8;

pub struct Machine {
    core: Home,
    engine: Box<dyn Engine>,
    mem: Arc<Memory>,
    /// Where the code of the last case still lies: the next one may be the same, and then the
    /// engine may use what it made of it.
    left: (u64, Vec<u8>),
}

/// A segment of 32-bit code: unusable, or data or code, with or without a limit.
fn segment(kind: u8, base: u64) -> Segment {
    let (limit, attr) = match kind {
        1 | 7 => (u32::MAX, 0xC0F3),
        2 => ((DATA + 0x17FF) as u32, 0x40F3),
        3 => (u32::MAX, 0xC0F1),
        4 => (DATA as u32, 0xC0F7),
        5 => (u32::MAX, 0xC0FB),
        6 => (u32::MAX, 0x80F3),
        _ => (0, 1 << 16),
    };
    Segment { base: base & 0xFFFF_FFFF, limit, attr, selector: SS as u16 }
}

/// Map one page for programs; tables are taken from `next`.
fn map(mem: &Memory, next: &mut u64, gva: u64, hpa: u64, flags: u64) {
    let mut table = PML4;
    for level in (1..4).rev() {
        let entry = table + 8 * (gva >> (12 + 9 * level) & 511);
        if mem.load(entry, 8) == 0 {
            mem.store(entry, 8, *next | 7);
            *next += 0x1000;
        }
        table = mem.load(entry, 8) & !0xFFF;
    }
    mem.store(table + 8 * (gva >> 12 & 511), 8, hpa | flags | 0x65);
}

impl Machine {
    pub fn new(kind: EngineKind, code_bytes: usize) -> std::io::Result<Self> {
        let mem = Memory::new(4 << 20)?;
        let mut next = FIRST_TABLE;
        const NX: u64 = 1 << 63;
        for by in ALIASES {
            for i in 0..CODE_PAGES as u64 {
                map(&mem, &mut next, by + CODE + 0x1000 * i, CODE_HPA + 0x1000 * i, 0);
            }
            for (i, (at, writable)) in PAGES.iter().enumerate() {
                let flags = NX | if *writable { 2 } else { 0 };
                map(&mem, &mut next, by + *at, PAGES_HPA + 0x1000 * i as u64, flags);
            }
        }
        mem.fill(CODE_HPA, (CODE_PAGES * PAGE) as u64, 0xCC);
        let mut core = Home::new(mem.clone(), Clock::Virtual, 0)?;
        let engine: Box<dyn Engine> = match kind {
            EngineKind::Reference => Box::new(Reference),
            EngineKind::Dbt => silicon::dbt::engine(&mut core, code_bytes)?,
        };
        core.cr0 = 0x8005_0033;
        core.cr3 = PML4;
        (core.cr4, core.xcr0) = (0x5_06A0, if is_x86_feature_detected!("avx") { 7 } else { 3 });
        core.efer = 0xD01;
        // No gate exists: INT3 and INTO end as #GP of their IDT entry.
        core.idtr.limit = 0;
        core.cpl = 3;
        Ok(Self { core, engine, mem, left: (CODE_HPA, Vec::new()) })
    }

    /// Windows for whom it says, from now on: there are none at first.
    pub fn use_windows(&mut self, windows: Windows) {
        self.engine.use_windows(&mut self.core, windows);
    }

    /// What the engine counted.
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.engine.statistics(&self.core)
    }

    /// Put the memory that following runs begin with.
    pub fn fill(&self, memory: &[u64]) {
        let bytes: Vec<u8> = memory.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(self.mem.write_bytes(PAGES_HPA, &bytes));
    }

    fn prepare(&mut self, s: &Start) {
        let c = &mut *self.core;
        c.gpr = s.gpr;
        c.rip = s.rip;
        c.rflags = s.rflags;
        let is_64 = s.bits() == 64;
        let unusable = |base| Segment { base, limit: 0, attr: 1 << 16, selector: 0 };
        let flat = Segment { base: 0, limit: u32::MAX, attr: 0xC0F3, selector: SS as u16 };
        let data = if is_64 { unusable(0) } else { flat };
        c.seg = [data; 6];
        c.seg[seg::SS] = flat;
        c.seg[seg::FS] = unusable(s.fs_base);
        c.seg[seg::GS] = unusable(s.gs_base);
        for (kind, i) in s.segments.into_iter().zip([seg::ES, seg::SS, seg::DS, seg::FS, seg::GS]) {
            let base = match i {
                seg::FS => s.fs_base,
                seg::GS => s.gs_base,
                _ if kind == 7 => 0xFFFF_FF00,
                _ => 0,
            };
            if kind != 0 {
                c.seg[i] = segment(kind, base);
            }
        }
        let attr = if is_64 { 0xA0FB } else { 0xC0FB };
        let limit = if is_64 { 0 } else { u32::MAX };
        c.seg[seg::CS] = Segment { base: 0, limit, attr, selector: s.cs as u16 };
        c.fx.0 = s.fx.0;
        c.upper.change(|halves| *halves = s.upper);
        c.pointers = silicon::cpu::pointers::Pointers::default();
        silicon::cpu::vector::settle(c);
        c.shadow = Shadow::None;
        c.pending_db = 0;
        c.vectoring = None;
        c.refresh();
        let (place, code) = (CODE_HPA + s.place(), &s.code[..s.code_len as usize]);
        if self.left.0 != place || self.left.1 != code {
            self.mem.fill(self.left.0, self.left.1.len() as u64, 0xCC);
            assert!(self.mem.write_bytes(place, code));
            self.left = (place, code.to_vec());
        }
    }

    /// Run a case; memory is as it was again afterwards.
    pub fn run(&mut self, s: &Start, memory: &[u64], executed: &mut u64) -> Outcome {
        self.prepare(s);
        let before = self.core.retired();
        let trap = self.go();
        if trap.is_some() {
            *executed += self.core.retired().wrapping_sub(before);
        }
        let c = &*self.core;
        let mut o = Outcome {
            gpr: c.gpr,
            rip: c.rip,
            rflags: c.rflags,
            fx: Fx(c.fx.0),
            upper: c.upper.all(),
            pointers: [
                c.pointers.fip,
                c.pointers.fdp,
                c.pointers.fop.into(),
                c.pointers.fcs.into(),
                c.pointers.fds.into(),
            ],
            vector: RUNAWAY,
            ..Outcome::NOTHING
        };
        if let Some(Trap::Exception(e)) = &trap {
            o.vector = u32::from(e.vector);
            o.error = e.error.unwrap_or(0);
            if e.vector == vector::PF {
                o.cr2 = e.payload;
            }
            // INT3 (3) and INTO (4) of which the gate is missing
            if e.vector == vector::GP && matches!(o.error, 0x1A | 0x22) {
                o.vector = o.error >> 3;
                o.error = 0;
                o.rip = silicon::cpu::step::fetch(&mut self.core).map_or(0, |(i, _)| i.next_ip());
            }
        } else if let Some(t) = trap {
            eprintln!("not an exception: {t:?}");
        }
        for (w, &was) in memory.iter().enumerate() {
            let at = PAGES_HPA + 8 * w as u64;
            let now = self.mem.load(at, 8);
            if now != was {
                o.note(w, now);
                self.mem.store(at, 8, was);
            }
        }
        o
    }

    /// Until something stops it; `None`: too long.
    fn go(&mut self) -> Option<Trap> {
        let core = &mut *self.core;
        let first = core.retired();
        for _ in 0..ENOUGH {
            let left = ENOUGH.saturating_sub(core.retired().wrapping_sub(first));
            if left == 0 {
                return None;
            }
            core.attention = 0;
            core.set_countdown(left as i64);
            let is_alone = core.shadow != Shadow::None || core.rflags & TF != 0;
            match if is_alone { step(core) } else { self.engine.run(core) } {
                Ok(()) | Err(Trap::Again) => {}
                Err(t) => return Some(t),
            }
        }
        None
    }
}
