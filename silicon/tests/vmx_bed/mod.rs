//! A host that is outside, and a guest: what the tests of VMX start from.
//!
//! Physical memory, by frames: 1 VMXON region, 2 VMCS, 3 MSR bitmaps, 4 and 5 I/O bitmaps,
//! 6 virtual-APIC page, 7 another VMCS, 8 MSR lists; 0x10 EPT (maps guest-physical to
//! host-physical + `GUEST`), from `GUEST` the guest's own memory.
#![allow(dead_code)]

pub mod agreement;

use silicon::arch::exit::Exit;
use silicon::arch::segment::{Segment, seg};
use silicon::arch::vmcs::{self as f, REVISION};
use silicon::cpu::state::{Clock, Core};
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::vmx::capabilities;
use silicon::vmx::controls::{entry, exit, pin, primary, secondary};
use silicon::vmx::instructions::{self as vmx, VmFail};

pub const VMXON: u64 = 0x1000;
pub const VMCS: u64 = 0x2000;
pub const MSR_BITMAPS: u64 = 0x3000;
pub const IO_BITMAP_A: u64 = 0x4000;
pub const IO_BITMAP_B: u64 = 0x5000;
pub const VIRTUAL_APIC: u64 = 0x6000;
pub const OTHER_VMCS: u64 = 0x7000;
pub const LISTS: u64 = 0x8000;
pub const EPT: u64 = 0x10000;
/// Host-physical address of the guest-physical 0.
pub const GUEST: u64 = 0x20_0000;
/// Guest-physical places.
pub const CODE: u64 = 0x1000;
pub const STACK: u64 = 0x8000;
pub const PML4: u64 = 0x10000;
pub const GDT: u64 = 0x20000;
pub const IDT: u64 = 0x21000;
pub const TSS: u64 = 0x22000;

/// The engine to test: the plain interpreter, or what UNDERSTUDY_ENGINE says.
fn engine() -> EngineKind {
    match std::env::var("UNDERSTUDY_ENGINE").as_deref() {
        Ok("dbt") => EngineKind::Dbt,
        _ => EngineKind::Reference,
    }
}

pub struct Bed {
    pub processor: Processor,
}

fn must(index: u32) -> u64 {
    capabilities::read(index).unwrap() & 0xFFFF_FFFF
}

impl Bed {
    /// In root operation, nothing current.
    pub fn root() -> Bed {
        Bed::root_on(engine())
    }

    fn root_on(engine: EngineKind) -> Bed {
        let mem = Memory::new(16 << 20).unwrap();
        let mut processor = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
        let core = &mut *processor.core;
        core.cr0 = 0x8001_0031;
        core.cr4 = 0x2020;
        core.efer = 0x500;
        core.cr3 = 0xF_0000;
        core.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC093, selector: 0x10 }; 6];
        core.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xA09B, selector: 8 };
        core.refresh();
        core.mem.store(VMXON, 4, u64::from(REVISION));
        core.mem.store(VMCS, 4, u64::from(REVISION));
        core.mem.store(OTHER_VMCS, 4, u64::from(REVISION));
        vmx::vmxon(core, VMXON).unwrap();
        Bed { processor }
    }

    /// A 64-bit guest under EPT with minimal controls, RIP at `CODE`.
    pub fn new() -> Bed {
        Bed::on(engine())
    }

    /// The same on an engine of choice.
    pub fn on(engine: EngineKind) -> Bed {
        let mut bed = Bed::root_on(engine);
        vmx::vmclear(bed.core(), VMCS).unwrap();
        vmx::vmptrld(bed.core(), VMCS).unwrap();
        bed.controls();
        bed.host();
        bed.guest();
        bed.ept();
        bed
    }

    pub fn core(&mut self) -> &mut Core {
        &mut self.processor.core
    }

    pub fn write(&mut self, field: u32, value: u64) -> &mut Self {
        vmx::vmwrite(self.core(), field, value).unwrap();
        self
    }

    pub fn read(&mut self, field: u32) -> u64 {
        vmx::vmread(self.core(), field).unwrap()
    }

    /// Set bits of a control word.
    pub fn set(&mut self, field: u32, bits: u32) -> &mut Self {
        let old = self.read(field);
        self.write(field, old | u64::from(bits))
    }

    /// Clear bits of a control word.
    pub fn clear(&mut self, field: u32, bits: u32) -> &mut Self {
        let old = self.read(field);
        self.write(field, old & !u64::from(bits))
    }

    fn controls(&mut self) {
        self.write(f::PIN_CONTROLS, must(0x48D));
        self.write(f::PRIMARY_CONTROLS, must(0x48E) | u64::from(primary::ACTIVATE_SECONDARY_CONTROLS));
        let second = secondary::ENABLE_EPT | secondary::ENABLE_VPID | secondary::UNRESTRICTED_GUEST;
        self.write(f::SECONDARY_CONTROLS, u64::from(second));
        let out =
            exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_EFER | exit::LOAD_EFER | exit::SAVE_DEBUG_CONTROLS;
        self.write(f::EXIT_CONTROLS, must(0x48F) | u64::from(out));
        let into = entry::IA32E_MODE_GUEST | entry::LOAD_EFER | entry::LOAD_DEBUG_CONTROLS;
        self.write(f::ENTRY_CONTROLS, must(0x490) | u64::from(into));
        self.write(f::EPT_POINTER, EPT | 0x1E).write(f::VPID, 1);
        self.write(f::MSR_BITMAPS, MSR_BITMAPS);
        self.write(f::IO_BITMAP_A, IO_BITMAP_A).write(f::IO_BITMAP_B, IO_BITMAP_B);
        self.write(f::VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC);
        self.write(f::VMCS_LINK_POINTER, u64::MAX);
        // Every exception exits, so that a guest without IDT ends with its cause.
        self.write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    }

    fn host(&mut self) {
        let (cr0, cr3, cr4) = (self.core().cr0, self.core().cr3, self.core().cr4);
        self.write(f::HOST_CR0, cr0).write(f::HOST_CR3, cr3).write(f::HOST_CR4, cr4);
        self.write(f::HOST_EFER, 0x500).write(f::HOST_CS, 8).write(f::HOST_TR, 0x18);
        for s in [f::HOST_ES, f::HOST_SS, f::HOST_DS, f::HOST_FS, f::HOST_GS] {
            self.write(s, 0x10);
        }
        self.write(f::HOST_RIP, 0xFFFF_8000_0000_1000).write(f::HOST_RSP, 0x7000);
    }

    fn guest(&mut self) {
        let flat = |n: u32, selector: u64, attr: u64| {
            [
                (f::GUEST_ES + 2 * n, selector),
                (f::GUEST_ES_LIMIT + 2 * n, 0xFFFF_FFFF),
                (f::GUEST_ES_ACCESS_RIGHTS + 2 * n, attr),
                (f::GUEST_ES_BASE + 2 * n, 0),
            ]
        };
        for n in [0, 2, 3, 4, 5] {
            for (field, value) in flat(n, 0x10, 0xC093) {
                self.write(field, value);
            }
        }
        for (field, value) in flat(1, 8, 0xA09B) {
            self.write(field, value);
        }
        self.write(f::GUEST_LDTR_ACCESS_RIGHTS, 0x10000);
        self.write(f::GUEST_TR, 0x28).write(f::GUEST_TR_ACCESS_RIGHTS, 0x8B);
        self.write(f::GUEST_TR_LIMIT, 0x67).write(f::GUEST_TR_BASE, TSS);
        self.write(f::GUEST_GDTR_BASE, GDT).write(f::GUEST_GDTR_LIMIT, 0xFF);
        self.write(f::GUEST_IDTR_BASE, IDT).write(f::GUEST_IDTR_LIMIT, 0xFFF);
        self.write(f::GUEST_CR0, 0x8001_0031).write(f::GUEST_CR3, PML4).write(f::GUEST_CR4, 0x2020);
        self.write(f::GUEST_EFER, 0x500).write(f::GUEST_DR7, 0x400);
        self.write(f::GUEST_RIP, CODE).write(f::GUEST_RSP, STACK).write(f::GUEST_RFLAGS, 2);
        // The guest maps its first 2 MBytes to themselves, for the user as well.
        self.guest_store(PML4, (PML4 + 0x1000) | 7);
        self.guest_store(PML4 + 0x1000, (PML4 + 0x2000) | 7);
        self.guest_store(PML4 + 0x2000, 0x87);
        for (i, raw) in [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF].into_iter().enumerate() {
            self.guest_store(GDT + 8 * i as u64, raw);
        }
    }

    /// Guest-physical 0 to 2M.
    fn ept(&mut self) {
        let mem = self.core().mem.clone();
        mem.store(EPT, 8, (EPT + 0x1000) | 7);
        mem.store(EPT + 0x1000, 8, (EPT + 0x2000) | 7);
        mem.store(EPT + 0x2000, 8, GUEST | 0xB7);
    }

    pub fn guest_store(&mut self, gpa: u64, value: u64) {
        self.core().mem.store(GUEST + gpa, 8, value);
    }

    /// Put code at `CODE`.
    pub fn code(&mut self, bytes: &[u8]) -> &mut Self {
        self.core().mem.write_bytes(GUEST + CODE, bytes);
        self
    }

    /// Put code some bytes further.
    pub fn code_at(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        self.core().mem.write_bytes(GUEST + CODE + at, bytes);
        self
    }

    /// A 64-bit interrupt gate to `CODE + at`.
    pub fn gate(&mut self, vector: u64, at: u64) -> &mut Self {
        let target = CODE + at;
        let gate = target & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (target >> 16 & 0xFFFF) << 48;
        self.guest_store(IDT + 16 * vector, gate);
        self.guest_store(IDT + 16 * vector + 8, target >> 32);
        self
    }

    /// VMLAUNCH, and run to an exit.
    pub fn launch(&mut self) -> Exit {
        match self.try_launch() {
            Ok(exit) => exit,
            Err(VmFail(n)) => panic!("VMLAUNCH failed with {n}: {}", self.core().vmx.complaint),
        }
    }

    pub fn try_launch(&mut self) -> Result<Exit, VmFail> {
        let failed = vmx::vmlaunch(self.core())?;
        Ok(failed.unwrap_or_else(|| self.run()))
    }

    /// VMRESUME, and run to an exit.
    pub fn resume(&mut self) -> Exit {
        match vmx::vmresume(self.core()) {
            Ok(failed) => failed.unwrap_or_else(|| self.run()),
            Err(VmFail(n)) => panic!("VMRESUME failed with {n}: {}", self.core().vmx.complaint),
        }
    }

    /// Run on, at most ten thousand instructions.
    pub fn run(&mut self) -> Exit {
        self.processor.run(10_000, &mut || false)
    }

    /// Back to a VMCS that was not launched.
    pub fn relaunchable(&mut self) -> &mut Self {
        vmx::vmclear(self.core(), VMCS).unwrap();
        vmx::vmptrld(self.core(), VMCS).unwrap();
        self
    }
}

/// What [`Bed::virtualize_apic`] uses: the APIC-access page, as the guest names it; a
/// posted-interrupt descriptor and its notification vector.
pub const PAGE: u64 = 0x5_0000;
pub const DESCRIPTOR: u64 = 0x9000;
pub const NOTIFICATION: u8 = 0xF2;

impl Bed {
    /// Virtualize the guest's APIC: by x2APIC MSRs or by its page, with "APIC-register
    /// virtualization", and with virtual and posted interrupts, or without.
    pub fn virtualize_apic(&mut self, by_msr: bool, registers: bool, delivery: bool) -> &mut Self {
        use secondary as s;
        self.set(PRIMARY, primary::USE_TPR_SHADOW | primary::USE_MSR_BITMAPS);
        self.set(SECONDARY, if by_msr { s::VIRTUALIZE_X2APIC_MODE } else { s::VIRTUALIZE_APIC_ACCESSES });
        self.set(SECONDARY, if registers { s::APIC_REGISTER_VIRTUALIZATION } else { 0 });
        self.write(f::APIC_ACCESS_ADDRESS, GUEST + PAGE);
        if delivery {
            self.set(SECONDARY, s::VIRTUAL_INTERRUPT_DELIVERY);
            self.set(PIN, pin::EXTERNAL_INTERRUPT_EXITING | pin::PROCESS_POSTED_INTERRUPTS);
            self.set(f::EXIT_CONTROLS, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT);
            self.write(f::POSTED_INTERRUPT_DESCRIPTOR, DESCRIPTOR);
            self.write(f::POSTED_INTERRUPT_NOTIFICATION_VECTOR, u64::from(NOTIFICATION));
        }
        self.core().apic.write(0xF0, 0x1FF, 0); // the machine's own APIC is on
        self
    }
}

/// Control-word fields with the bits' names, for tables.
pub const PIN: u32 = f::PIN_CONTROLS;
pub const PRIMARY: u32 = f::PRIMARY_CONTROLS;
pub const SECONDARY: u32 = f::SECONDARY_CONTROLS;
pub const TIMER_ON: u32 = pin::ACTIVATE_PREEMPTION_TIMER;
