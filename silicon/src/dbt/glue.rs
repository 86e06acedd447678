//! The fixed pieces of generated code: the way in, the ways out, and calls of helpers.

use std::mem::offset_of;

use super::asm::{Asm, Mem, RAX, RDI, RSI, RSP, T0, T1, at, state};
use super::map::PINNED;
use super::tables::Tables;
use crate::cpu::state::Core;

/// Offset of a field of the tables inside the state.
#[must_use]
pub fn table(field: usize) -> usize {
    offset_of!(Core, jit) + field
}

/// Offset of a guest register's slot.
#[must_use]
pub fn slot(guest: usize) -> usize {
    offset_of!(Core, gpr) + 8 * guest
}

/// Where the fixed pieces are.
#[derive(Clone, Copy, Default)]
pub struct Glue {
    /// `extern "C" fn(core, host)`.
    pub enter: u64,
    /// All state is stored already: leave.
    pub exit_stored: u64,
    /// Store all state but the flags, which are in the record, and leave.
    pub exit: u64,
    /// T0 is the address of an indirect transfer: find its block or leave.
    pub indirect: u64,
    /// Called with T0 = linear address, T1 = kind: T0 becomes a host pointer, or the instruction is
    /// interpreted.
    pub fill: u64,
    /// Called with T1 = the number of a site: interpret its instruction.
    pub step: u64,
    /// Called: load the flags that the record tells how to make.
    pub flags: u64,
    /// Jumped to from the signal handler with T0 = the host address that faulted.
    pub fault: u64,
}

/// The helpers that the pieces call.
#[derive(Clone, Copy)]
pub struct Helpers {
    /// (core, gva, kind) -> host pointer or 0.
    pub fill: u64,
    /// (core, number of the site) -> host address or 0.
    pub step: u64,
    /// (core, address of a faulting instruction) -> host address or 0.
    pub fault: u64,
    /// (core) -> host address or 0.
    pub lookup: u64,
    /// (core): make the record's flags.
    pub flags: u64,
}

fn shifted(m: Mem, by: i32) -> Mem {
    Mem { disp: m.disp + by, ..m }
}

struct Writer<'a> {
    a: &'a mut Asm,
    /// How far the stack pointer is below the state.
    below: i32,
}

impl Writer<'_> {
    fn state(&self, disp: usize) -> Mem {
        shifted(state(disp), self.below)
    }
    fn flags_out(&mut self) {
        // RAX is stored already.
        self.a.raw(&[0x9F, 0x0F, 0x90, 0xC0]); // lahf; seto al
        self.a.raw(&[0x0F, 0xB7, 0xC0]); // movzx eax, ax
        let m = self.state(table(offset_of!(Tables, flags)));
        self.a.store(m, RAX); // as wide as it is read
    }
    fn flags_in(&mut self) {
        let m = self.state(table(offset_of!(Tables, flags)));
        self.a.load16(RAX, m);
        self.a.raw(&[0x04, 0x7F, 0x9E]); // add al, 0x7F; sahf
    }
    fn registers_out(&mut self) {
        for &(guest, host) in &PINNED {
            let m = self.state(slot(guest));
            self.a.store(m, host);
        }
    }
    fn registers_in(&mut self) {
        self.flags_in();
        for &(guest, host) in &PINNED {
            let m = self.state(slot(guest));
            self.a.load(host, m);
        }
    }
    fn xmm(&mut self, opcode: u8) {
        for i in 0..16_u8 {
            let m = self.state(offset_of!(Core, fx) + 160 + 16 * usize::from(i));
            self.a.rm(&[], false, &[0x0F, opcode], i, m);
        }
    }
    fn xmm_out(&mut self) {
        self.xmm(0x29);
    }
    fn xmm_in(&mut self) {
        self.xmm(0x28);
    }
    /// Call a helper with the state as first argument, at an aligned stack pointer.
    fn call_helper(&mut self, helper: u64) {
        let m = self.state(0);
        self.a.lea(RDI, m);
        self.a.imm(RAX, helper);
        let odd = self.below == 0; // a call needs RSP + 8 == 0 mod 16 at entry
        let pad = if odd { 0 } else { 8 };
        if pad != 0 {
            self.a.raw(&[0x48, 0x83, 0xEC, 8]);
        }
        self.a.raw(&[0xFF, 0xD0]); // call rax
        if pad != 0 {
            self.a.raw(&[0x48, 0x83, 0xC4, 8]);
        }
    }
    fn test_rax(&mut self) {
        self.a.raw(&[0x48, 0x85, 0xC0]);
    }
}

/// Behind the call of `fill` comes a jump of so many bytes, then the number of the site.
const AFTER_JUMP: i32 = 5;
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

/// Write the pieces at the assembler's place.
pub fn write(a: &mut Asm, h: Helpers) -> Glue {
    let mut g = Glue { enter: a.here(), ..Glue::default() };
    let fx = offset_of!(Core, fx);
    for r in CALLEE_SAVED {
        a.raw(if r >= 8 { &[0x41] } else { &[] });
        a.raw(&[0x50 | (r & 7)]);
    }
    a.mov(T0, RSI);
    a.store(Mem { base: Some(RDI), index: None, disp: table(offset_of!(Tables, saved_rsp)) as i32 }, RSP);
    a.mov(RSP, RDI);
    a.rm(&[], false, &[0x0F, 0xAE], 3, state(table(offset_of!(Tables, host_mxcsr)))); // stmxcsr
    a.rm(&[], true, &[0x0F, 0xAE], 1, state(fx)); // fxrstor64
    Writer { a, below: 0 }.registers_in();
    a.raw(&[0x41, 0xFF, 0xE0 | (T0 & 7)]); // jmp T0

    g.exit = a.here();
    let mut w = Writer { a, below: 0 };
    w.registers_out();
    w.xmm_out();
    g.exit_stored = a.here();
    leave(a, fx);

    g.indirect = a.here();
    a.store(state(offset_of!(Core, rip)), T0);
    let mut w = Writer { a, below: 0 };
    w.registers_out();
    w.xmm_out();
    w.call_helper(h.lookup);
    resume_or_leave(a, g.exit_stored);

    // Called: the return address lies between the stack pointer and the state.
    g.fill = a.here();
    let mut w = Writer { a, below: 8 };
    w.registers_out();
    w.xmm_out();
    w.a.mov(RSI, T0);
    w.a.mov(2, T1);
    w.call_helper(h.fill);
    w.test_rax();
    let failed = w.a.jcc_later(super::asm::cc::E);
    w.a.mov(T0, RAX);
    w.xmm_in();
    w.registers_in();
    w.a.raw(&[0xC3]);
    let here = w.a.here();
    w.a.patch(failed, here);
    w.a.load(RSI, at(RSP));
    w.a.rm(&[], false, &[0x8B], RSI, Mem { base: Some(RSI), index: None, disp: AFTER_JUMP }); // mov esi, [rsi + 5]
    let to_step = w.a.jmp_later();

    g.step = a.here();
    let mut w = Writer { a, below: 8 };
    w.registers_out();
    w.flags_out();
    w.xmm_out();
    w.a.mov(RSI, T1);
    let here = w.a.here();
    w.a.patch(to_step, here);
    w.call_helper(h.step);
    a.raw(&[0x48, 0x83, 0xC4, 8]); // drop the return address
    resume_or_leave(a, g.exit_stored);

    g.flags = a.here();
    let mut w = Writer { a, below: 8 };
    w.registers_out();
    w.xmm_out();
    let scratch = w.state(table(offset_of!(Tables, pointer)));
    w.a.store(scratch, T0);
    w.call_helper(h.flags);
    w.xmm_in();
    w.registers_in();
    let scratch = w.state(table(offset_of!(Tables, pointer)));
    w.a.load(T0, scratch);
    w.a.raw(&[0xC3]);

    g.fault = a.here();
    let mut w = Writer { a, below: 0 };
    w.registers_out();
    w.flags_out();
    w.xmm_out();
    w.a.mov(RSI, T0);
    w.call_helper(h.fault);
    resume_or_leave(a, g.exit_stored);
    g
}

/// RAX is where to go on, or 0 to leave; all state is stored.
fn resume_or_leave(a: &mut Asm, exit_stored: u64) {
    a.raw(&[0x48, 0x85, 0xC0]);
    a.jcc(super::asm::cc::E, exit_stored);
    a.mov(T0, RAX);
    let mut w = Writer { a, below: 0 };
    w.xmm_in();
    w.registers_in();
    a.raw(&[0x41, 0xFF, 0xE0 | (T0 & 7)]);
}

/// Give the computer its own state back and return.
fn leave(a: &mut Asm, fx: usize) {
    // x87 state is live in the processor, XMM is stored (and may be newer in memory): reload it so
    // that one FXSAVE has everything.
    let mut w = Writer { a, below: 0 };
    w.xmm_in();
    a.rm(&[], true, &[0x0F, 0xAE], 0, state(fx)); // fxsave64
    a.raw(&[0xDB, 0xE3]); // fninit
    a.rm(&[], false, &[0x0F, 0xAE], 2, state(table(offset_of!(Tables, host_mxcsr)))); // ldmxcsr
    a.load(RSP, state(table(offset_of!(Tables, saved_rsp))));
    for r in CALLEE_SAVED.iter().rev() {
        a.raw(if *r >= 8 { &[0x41] } else { &[] });
        a.raw(&[0x58 | (r & 7)]);
    }
    a.raw(&[0xC3]);
}
