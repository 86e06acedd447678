//! Virtual interrupts against a model: the pseudo-code of the manual (SDM 3C, "APIC Virtualization
//! and Virtual Interrupts"), followed through random accesses, entries and posted interrupts.
//!
//! One step is one VM entry.  The guest makes one access and then executes VMCALL; so does the
//! handler of each vector, at an address of its own, which tells what was delivered.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{pin, primary};
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];
const HANDLERS: u64 = 0x3_0000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    fn vector(&mut self) -> u8 {
        self.below(256) as u8
    }
}

/// How an access is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Page,
    Msr,
    Cr8,
}

/// The model: what the manual keeps, and what it does with it.
#[derive(Clone, PartialEq, Debug)]
struct Model {
    has_delivery: bool,
    has_registers: bool,
    has_window: bool,
    threshold: u64,
    eoi_exits: [u64; 4],
    page: Vec<u8>,
    rvi: u8,
    svi: u8,
    recognized: bool,
    requests: [u64; 4],
    trap: Option<(u32, u64)>,
}

impl Model {
    fn set_register(&mut self, at: usize, value: u32) {
        self.page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    fn bits(&self, base: usize) -> Vec<u8> {
        (0..=255)
            .filter(|&v| {
                self.page[base + usize::from(v) / 32 * 16 + usize::from(v) % 32 / 8] >> (v % 8) & 1 != 0
            })
            .collect()
    }
    fn set_bit(&mut self, base: usize, v: u8, on: bool) {
        let byte = &mut self.page[base + usize::from(v) / 32 * 16 + usize::from(v) % 32 / 8];
        *byte = *byte & !(1 << (v % 8)) | u8::from(on) << (v % 8);
    }
    fn ppr_virtualization(&mut self) {
        let vtpr = self.page[0x80];
        let new = if vtpr >> 4 >= self.svi >> 4 { vtpr } else { self.svi & 0xF0 };
        self.set_register(0xA0, u32::from(new));
    }
    fn evaluate(&mut self) {
        self.recognized = !self.has_window && self.rvi >> 4 > self.page[0xA0] >> 4;
    }
    fn tpr_virtualization(&mut self) {
        if self.has_delivery {
            self.ppr_virtualization();
            self.evaluate();
        } else if u64::from(self.page[0x80] >> 4) < self.threshold {
            self.trap = Some((43, 0));
        }
    }
    fn eoi_virtualization(&mut self) {
        let vector = self.svi;
        self.set_bit(0x100, vector, false);
        self.svi = self.bits(0x100).last().copied().unwrap_or(0);
        self.ppr_virtualization();
        if self.eoi_exits[usize::from(vector) / 64] >> (vector % 64) & 1 == 1 {
            self.trap = Some((45, u64::from(vector)));
        } else {
            self.evaluate();
        }
    }
    fn self_ipi_virtualization(&mut self, vector: u8) {
        self.set_bit(0x200, vector, true);
        self.rvi = self.rvi.max(vector);
        self.evaluate();
    }
    fn delivery(&mut self) -> u8 {
        let vector = self.rvi;
        self.set_bit(0x100, vector, true);
        self.svi = vector;
        self.set_register(0xA0, u32::from(vector & 0xF0));
        self.set_bit(0x200, vector, false);
        self.rvi = self.bits(0x200).last().copied().unwrap_or(0);
        self.recognized = false;
        vector
    }
    fn posted(&mut self) {
        for v in 0..=255_u8 {
            if self.requests[usize::from(v) / 64] >> (v % 64) & 1 == 1 {
                self.set_bit(0x200, v, true);
                self.rvi = self.rvi.max(v);
            }
        }
        self.requests = [0; 4];
        self.evaluate();
    }
    fn entry(&mut self) {
        self.recognized = false;
        if self.has_delivery {
            self.ppr_virtualization();
            self.evaluate();
        }
    }

    /// A write by MSR or page; what comes instead of going on.
    fn write(&mut self, how: How, at: u64, value: u64) -> Result<(), Fault> {
        let slot = at as usize;
        match how {
            How::Cr8 => {
                self.set_register(0x80, (value as u32) << 4);
                self.tpr_virtualization();
            }
            How::Msr => {
                match at {
                    0x80 | 0x3F0 if value >> 8 != 0 => return Err(Fault),
                    0xB0 if value != 0 => return Err(Fault),
                    _ => {}
                }
                self.page[slot..slot + 8].copy_from_slice(&value.to_le_bytes());
                match at {
                    0x80 => self.tpr_virtualization(),
                    0xB0 => self.eoi_virtualization(),
                    _ if value >> 4 == 0 => self.trap = Some((56, at)),
                    _ => self.self_ipi_virtualization(value as u8),
                }
            }
            How::Page => {
                self.set_register(slot, value as u32);
                match at {
                    0x80 => {
                        self.set_register(0x80, value as u32 & 0xFF);
                        self.tpr_virtualization();
                    }
                    0xB0 if self.has_delivery => {
                        self.set_register(0xB0, 0);
                        self.eoi_virtualization();
                    }
                    0x300 if self.has_delivery => {
                        // Reserved bits, delivery status, shorthand, trigger, delivery mode, class.
                        let low = value as u32;
                        let is_plain = low & 0xFFF3_3000 == 0 && low >> 18 & 3 == 1 && low >> 15 & 1 == 0;
                        if is_plain && low >> 8 & 7 == 0 && low >> 4 & 0xF != 0 {
                            self.self_ipi_virtualization(value as u8);
                        } else {
                            self.trap = Some((56, at));
                        }
                    }
                    0x310 => self.set_register(0x310, value as u32 & 0xFF00_0000),
                    _ => self.trap = Some((56, at)),
                }
            }
        }
        Ok(())
    }
}

/// #GP(0).
#[derive(Debug)]
struct Fault;

fn code(how: How, at: u64) -> Vec<u8> {
    match how {
        How::Cr8 => vec![0x44, 0x0F, 0x22, 0xC0], // mov cr8, rax
        How::Msr => vec![0x0F, 0x30],             // wrmsr
        // mov [..], eax
        How::Page => [&[0xA3][..], &(PAGE + at).to_le_bytes()].concat(),
    }
}

/// Every vector has a handler.
fn handled(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    for v in 0..256 {
        bed.gate(v, HANDLERS - CODE + 4 * v);
        bed.core().mem.write_bytes(GUEST + HANDLERS + 4 * v, &VMCALL);
    }
    bed
}

fn bed(engine: EngineKind, m: &Model, by_msr: bool) -> Bed {
    let mut bed = handled(engine);
    bed.virtualize_apic(by_msr, m.has_registers, m.has_delivery).write(f::TPR_THRESHOLD, m.threshold);
    for (n, &word) in m.eoi_exits.iter().enumerate() {
        bed.write(f::EOI_EXIT_BITMAP_0 + 2 * n as u32, word);
    }
    bed
}

#[test]
fn random_accesses_entries_and_posted_interrupts_do_what_the_manuals_pseudo_code_does() {
    let mut seen = std::collections::BTreeMap::new();
    for seed in 1..=60_u64 {
        let mut r = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let uses_msrs = r.chance(50);
        let has_delivery = r.chance(80);
        let mut m = Model {
            has_delivery,
            has_registers: r.chance(50),
            has_window: false,
            threshold: if has_delivery { 0 } else { r.below(4) },
            eoi_exits: [0; 4].map(|_: u64| r.next() & r.next()),
            page: vec![0; 4096],
            rvi: 0,
            svi: 0,
            recognized: false,
            requests: [0; 4],
            trap: None,
        };
        m.page[0x80] = 0x40; // above the threshold
        let engine = if seed % 2 == 0 { EngineKind::Dbt } else { EngineKind::Reference };
        let mut bed = bed(engine, &m, uses_msrs);
        bed.core().mem.store(VIRTUAL_APIC + 0x80, 4, 0x40);
        for step in 0..150 {
            // The host changes something.
            m.has_window = m.has_delivery && r.chance(10);
            let (old, bit) = (bed.read(PRIMARY), u64::from(primary::INTERRUPT_WINDOW_EXITING));
            bed.write(PRIMARY, if m.has_window { old | bit } else { old & !bit });
            if m.has_delivery && r.chance(30) {
                let v = r.vector();
                m.set_bit(0x200, v, true);
                m.rvi = m.rvi.max(v);
                bed.write(f::GUEST_INTERRUPT_STATUS, u64::from(m.rvi) | u64::from(m.svi) << 8);
                let at = VIRTUAL_APIC + 0x200 + u64::from(v / 32) * 16;
                let word = bed.core().mem.load(at, 4) | 1 << (v % 32);
                bed.core().mem.store(at, 4, word);
            }
            // Below the threshold an entry fails, or exits at once.
            let is_below = !m.has_delivery && u64::from(m.page[0x80] >> 4) < m.threshold;
            if is_below && (uses_msrs || r.chance(50)) {
                m.set_register(0x80, 0x40);
                bed.core().mem.store(VIRTUAL_APIC + 0x80, 4, 0x40);
            }
            let is_notified = m.has_delivery && r.chance(20);
            if is_notified {
                for _ in 0..r.below(3) {
                    let v = r.vector();
                    m.requests[usize::from(v) / 64] |= 1 << (v % 64);
                }
                let core = bed.core();
                for (n, &word) in m.requests.iter().enumerate() {
                    core.mem.store(DESCRIPTOR + 8 * n as u64, 8, word);
                }
                core.mem.store(DESCRIPTOR + 32, 8, 0xABCD_0001);
                core.apic.raise_vector(NOTIFICATION, false);
            }
            // The guest's access.
            let how = match r.below(4) {
                0 => How::Cr8,
                _ if uses_msrs => How::Msr,
                _ => How::Page,
            };
            let all = match how {
                How::Cr8 => &[0x80][..],
                How::Msr if m.has_delivery => &[0x80, 0xB0, 0xB0, 0x3F0],
                How::Msr => &[0x80],
                How::Page if m.has_registers => &[0x80, 0xB0, 0xB0, 0x300, 0x300, 0x310, 0x320, 0xE0],
                How::Page if m.has_delivery => &[0x80, 0xB0, 0xB0, 0x300],
                How::Page => &[0x80],
            };
            let at = all[r.below(all.len() as u64) as usize];
            let value = match (how, at) {
                (How::Cr8, _) => r.below(16),
                (_, 0xB0) if r.chance(90) => 0,
                (_, 0x300) => {
                    0x4_0000 | u64::from(r.vector()) | if r.chance(20) { 1 << r.below(32) } else { 0 }
                }
                (How::Msr, _) => u64::from(r.vector()) | if r.chance(5) { 1 << r.below(64) } else { 0 },
                _ => r.next() & 0xFFFF_FFFF,
            };
            let is_open = r.chance(70);
            let bytes = code(how, at);
            let length = bytes.len() as u64;
            let (blocked_by_sti, flags) = (is_open && r.chance(20), if is_open { 0x202 } else { 2 });
            bed.code(&[&bytes[..], &VMCALL].concat());
            bed.write(f::GUEST_RIP, CODE).write(f::GUEST_RFLAGS, flags).write(f::GUEST_RSP, STACK);
            bed.write(f::GUEST_INTERRUPTIBILITY_STATE, u64::from(blocked_by_sti));
            let core = bed.core();
            (core.gpr[0], core.gpr[1], core.gpr[2]) = (value & 0xFFFF_FFFF, 0x800 + at / 16, value >> 32);
            if how == How::Cr8 {
                core.gpr[0] = value;
            }
            let before = (m.rvi, m.svi, m.page[0x80]);
            let e = if step == 0 { bed.launch() } else { bed.resume() };

            // What the model expects.
            m.trap = None;
            m.entry();
            // (The threshold is looked at after entries, too.)
            if !m.has_delivery && !uses_msrs && u64::from(m.page[0x80] >> 4) < m.threshold {
                m.trap = Some((43, 0));
            }
            let mut is_posted = is_notified; // still to be processed
            let mut is_shadowed = blocked_by_sti;
            let mut rip = CODE;
            let want = loop {
                if let Some((why, qualification)) = m.trap.take() {
                    break (why, qualification, rip);
                }
                let may = is_open && !is_shadowed;
                if may && m.has_window {
                    break (reason::INTERRUPT_WINDOW, 0, rip);
                }
                if may && m.recognized {
                    let v = m.delivery();
                    if std::mem::take(&mut is_posted) {
                        m.posted();
                    }
                    break (reason::VMCALL, 0, HANDLERS + 4 * u64::from(v));
                }
                if std::mem::take(&mut is_posted) {
                    m.posted();
                    continue;
                }
                if rip != CODE {
                    break (reason::VMCALL, 0, rip);
                }
                is_shadowed = false;
                match m.write(how, at, value) {
                    Ok(()) => rip = CODE + length,
                    Err(Fault) => break (reason::EXCEPTION_OR_NMI, 0, rip),
                }
            };
            let what = format!(
                "seed {seed} step {step}: {how:?} {at:#x} {value:#x}, open {is_open}, RVI, SVI, VTPR {before:x?}"
            );
            assert_eq!(want, (e.reason, e.qualification, bed.read(f::GUEST_RIP)), "{what}");
            *seen.entry(want.0).or_insert(0) += 1;
            if want.2 >= HANDLERS {
                *seen.entry(1000).or_insert(0) += 1;
            }
            let mut page = vec![0; 4096];
            bed.core().mem.read_bytes(VIRTUAL_APIC, &mut page);
            if let Some(n) = (0..4096).find(|&n| m.page[n] != page[n]) {
                panic!("{what}: byte {n:#x} is {:#x}, not {:#x}", page[n], m.page[n]);
            }
            if m.has_delivery {
                assert_eq!(
                    u64::from(m.rvi) | u64::from(m.svi) << 8,
                    bed.read(f::GUEST_INTERRUPT_STATUS),
                    "{what}"
                );
            }
            if is_notified {
                if !is_posted {
                    let mem = &bed.core().mem;
                    let words: Vec<u64> = (0..5).map(|n| mem.load(DESCRIPTOR + 8 * n, 8)).collect();
                    assert_eq!(vec![0, 0, 0, 0, 0xABCD_0000], words, "{what}");
                }
                // What no exit came before is dismissed: the next one can come.
                bed.core().apic.end_of_interrupt();
                while bed.core().apic.accept().is_some() {
                    bed.core().apic.end_of_interrupt();
                }
            }
        }
    }
    for (why, least) in [(18, 2000), (43, 50), (45, 50), (56, 100), (7, 100), (0, 10), (1000, 1000)] {
        assert!(seen.get(&why).is_some_and(|&n| n >= least), "{why}: {seen:?}");
    }
}

/// With virtual interrupts, the APIC virtualized by MSR, and the handlers.
fn plain(engine: EngineKind) -> Bed {
    let mut bed = handled(engine);
    bed.virtualize_apic(true, true, true);
    bed
}

#[test]
fn a_guest_sends_itself_interrupts_and_ends_them_without_any_exit() {
    let mut states = Vec::new();
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        let mut bed = plain(engine);
        // mov ecx, 83Fh; mov eax, 41h; xor edx, edx; wrmsr; dec ebx; jnz; vmcall
        bed.code(&[0xB9, 0x3F, 8, 0, 0, 0xB8, 0x41, 0, 0, 0, 0x31, 0xD2, 0x0F, 0x30, 0xFF, 0xCB, 0x75, 0xEE]);
        bed.code_at(18, &VMCALL);
        // inc esi; mov ecx, 80Bh; xor eax, eax; xor edx, edx; wrmsr; iretq
        bed.gate(0x41, 0x100);
        bed.code_at(
            0x100,
            &[0xFF, 0xC6, 0xB9, 0x0B, 8, 0, 0, 0x31, 0xC0, 0x31, 0xD2, 0x0F, 0x30, 0x48, 0xCF],
        );
        bed.write(f::GUEST_RFLAGS, 0x202).core().gpr[3] = 500;
        bed.guest_store(GDT + 16, 0x00CF_9300_0000_FFFF);
        assert_eq!(reason::VMCALL, bed.launch().reason);
        assert_eq!((0, 0x202 | 0x44), (bed.read(f::GUEST_INTERRUPT_STATUS), bed.read(f::GUEST_RFLAGS)));
        let core = bed.core();
        assert_eq!((500, 500), (core.gpr[6], core.counts.injected[0x41]));
        states.push((core.retired(), core.counts.clone()));
    }
    assert_eq!(states[0], states[1]);
}

#[test]
fn a_virtual_interrupt_wakes_a_guest_that_waits() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        // sti; hlt; vmcall, and a handler that is HANDLERS' own; cli before HLT: nothing wakes.
        for (first, why) in [(0xFB, reason::VMCALL), (0xFA, reason::PREEMPTION_TIMER)] {
            let mut bed = plain(engine);
            bed.set(PIN, TIMER_ON).write(f::PREEMPTION_TIMER_VALUE, 100_000);
            bed.code(&[first, 0xF4, 0x0F, 0x01, 0xC1]);
            bed.launch_in_time(1000, |bed| {
                let mem = bed.core().mem.clone();
                assert_eq!(silicon::cpu::state::Activity::Hlt, bed.core().activity);
                mem.store(DESCRIPTOR + 8, 8, 1 << 5); // vector 45h
                mem.store(DESCRIPTOR + 32, 8, 1);
                bed.core().apic.raise_vector(NOTIFICATION, false);
            });
            let e = bed.run();
            assert_eq!(why, e.reason);
            let (rip, status) = (bed.read(f::GUEST_RIP), bed.read(f::GUEST_INTERRUPT_STATUS));
            if why == reason::VMCALL {
                assert_eq!(
                    (HANDLERS + 4 * 0x45, 0x4500, 0),
                    (rip, status, bed.read(f::GUEST_ACTIVITY_STATE))
                );
            } else {
                assert_eq!((CODE + 2, 0x45, 1), (rip, status, bed.read(f::GUEST_ACTIVITY_STATE)));
            }
            assert_eq!(0, bed.core().mem.load(DESCRIPTOR + 32, 8));
        }
    }
}

trait InTime {
    fn launch_in_time(&mut self, instructions: u64, then: impl FnMut(&mut Bed));
}

impl InTime for Bed {
    /// Enter, run until the guest waits, and let the host's devices do something.
    fn launch_in_time(&mut self, instructions: u64, mut then: impl FnMut(&mut Bed)) {
        vmx::vmlaunch(self.core()).unwrap();
        let mut n = instructions;
        while self.core().activity == silicon::cpu::state::Activity::Active && n > 0 {
            let e = self.processor.run(1, &mut || false);
            assert_eq!(reason::BUDGET, e.reason);
            n -= 1;
        }
        then(self);
    }
}

#[test]
fn an_interrupt_with_another_vector_exits_with_its_vector() {
    let mut bed = plain(EngineKind::Reference);
    bed.code(&VMCALL);
    bed.core().apic.raise_vector(0x77, false);
    bed.core().apic.raise_vector(0x33, false);
    let e = bed.launch();
    assert_eq!((reason::EXTERNAL_INTERRUPT, 1 << 31 | 0x77), (e.reason, e.intr_info));
}

#[test]
fn an_exit_during_the_delivery_of_a_virtual_interrupt_names_it() {
    let mut bed = plain(EngineKind::Reference);
    bed.code(&VMCALL).write(f::GUEST_RFLAGS, 0x202).write(f::GUEST_INTERRUPT_STATUS, 0x66);
    bed.write(f::GUEST_RSP, 0x30_0000); // mapped by nobody
    let e = bed.launch();
    assert_eq!((reason::EXCEPTION_OR_NMI, 14, 1 << 31 | 0x66), (e.reason, e.intr_info & 0xFF, e.idt_info));
    // It is in service already: the hypervisor injects it again by hand.
    assert_eq!((0x6600, CODE), (bed.read(f::GUEST_INTERRUPT_STATUS), bed.read(f::GUEST_RIP)));
}

#[test]
fn nmis_come_first_and_the_monitor_trap_flag_stops_before_the_handler() {
    let mut bed = plain(EngineKind::Reference);
    bed.code(&VMCALL).write(f::GUEST_RFLAGS, 0x202).write(f::GUEST_INTERRUPT_STATUS, 0x66);
    bed.set(PIN, pin::NMI_EXITING).set(PRIMARY, primary::MONITOR_TRAP_FLAG);
    bed.core().nmi_pending = true;
    let e = bed.launch();
    assert_eq!((reason::EXCEPTION_OR_NMI, 2), (e.reason, e.intr_info & 0xFF));
    bed.core().nmi_blocked = false;
    let e = bed.resume();
    assert_eq!((reason::MTF, HANDLERS + 4 * 0x66), (e.reason, bed.read(f::GUEST_RIP)));
}
