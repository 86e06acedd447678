//! The fixed pieces of generated code: the way in, the ways out, and calls of helpers.

use std::mem::offset_of;

use super::asm::{Asm, Mem, RAX, RDI, RDX, RSI, RSP, Source, T0, T1, at, state};
use super::map::PINNED;
use super::record::{B_INSIDE, Kind, Record};
use super::tables::{MAKERS, Tables};
use crate::arch::segment::Segment;
use crate::cpu::state::Core;
use crate::cpu::upper;

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

/// Offset of a segment's base.
#[must_use]
pub fn segment_base(which: usize) -> usize {
    offset_of!(Core, seg) + which * size_of::<Segment>() + offset_of!(Segment, base)
}

/// Where the fixed pieces are.
#[derive(Clone, Copy)]
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
    /// Called: T1 becomes the computer's time, the computer's flags are lost.
    pub time: u64,
    /// Called: load the flags that the record tells how to make.
    pub flags: u64,
    /// For [`Tables::makers`].
    pub makers: [u64; MAKERS],
    /// Jumped to from the signal handler with T0 = the host address that faulted, T1 = the page that it
    /// accessed ([`super::signals::register`]).
    pub fault: u64,
}

/// The helpers that the pieces call.
#[derive(Clone, Copy)]
pub struct Helpers {
    /// (core, gva, kind) -> host pointer or 0.
    pub fill: u64,
    /// (core, number of the site) -> host address or 0.
    pub step: u64,
    /// (core, address of a faulting instruction, what it accessed) -> host address or 0.
    pub fault: u64,
    /// (core) -> host address or 0.
    pub lookup: u64,
    /// (core): make the record's flags.
    pub flags: u64,
    /// (core) -> nanoseconds of the computer's clock.
    pub time: u64,
}

fn shifted(m: Mem, by: i32) -> Mem {
    Mem { disp: m.disp + by, ..m }
}

struct Writer<'a> {
    a: &'a mut Asm,
    /// The computer has AVX.
    has_avx: bool,
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
    /// Store XMM and YMM registers, whose upper halves are clear afterwards: Rust's code is made of SSE.
    fn vectors_out(&mut self) {
        self.xmm(0x29);
        if self.has_avx {
            let unused = self.unless_upper();
            for i in 0..16 {
                self.upper(0x19, i, 0); // vextractf128 m, ymm, 1
            }
            self.a.raw(&VZEROUPPER);
            let here = self.a.here();
            self.a.patch(unused, here);
        }
    }
    /// Load them.
    fn vectors_in(&mut self) {
        if self.has_avx {
            self.a.raw(&VZEROUPPER);
        }
        self.xmm(0x28);
        self.upper_in();
    }
    /// Load the upper halves, which are clear.
    fn upper_in(&mut self) {
        if self.has_avx {
            let unused = self.unless_upper();
            for i in 0..16 {
                self.upper(0x18, i, i); // vinsertf128 ymm, ymm, m, 1
            }
            let here = self.a.here();
            self.a.patch(unused, here);
        }
    }
    /// Emit a branch that is taken if no upper half is in use.
    fn unless_upper(&mut self) -> usize {
        let m = self.state(upper::IN_USE);
        self.a.rm(&[], true, &[0x83], 7, m); // cmp qword m, 0
        self.a.raw(&[0]);
        self.a.jcc_later(super::asm::cc::E)
    }
    /// An instruction with an upper half in memory and two registers.
    fn upper(&mut self, opcode: u8, register: u8, source: u8) {
        let disp = self.state(upper::HALVES + 16 * usize::from(register)).disp;
        let map = if register >= 8 { 0x63 } else { 0xE3 };
        self.a.raw(&[0xC4, map, 0x7D ^ source << 3, opcode, 0x84 | (register & 7) << 3, 0x24]);
        self.a.raw(&disp.to_le_bytes());
        self.a.raw(&[1]);
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
const VZEROUPPER: [u8; 3] = [0xC5, 0xF8, 0x77];
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

/// Write the pieces at the assembler's place.
pub fn write(a: &mut Asm, h: Helpers) -> Glue {
    let mut g = Glue {
        enter: a.here(),
        exit_stored: 0,
        exit: 0,
        indirect: 0,
        fill: 0,
        step: 0,
        time: 0,
        flags: 0,
        makers: [0; MAKERS],
        fault: 0,
    };
    let fx = offset_of!(Core, fx);
    let has_avx = is_x86_feature_detected!("avx");
    for r in CALLEE_SAVED {
        a.raw(if r >= 8 { &[0x41] } else { &[] });
        a.raw(&[0x50 | (r & 7)]);
    }
    a.mov(T0, RSI);
    a.store(Mem::new(Some(RDI), None, table(offset_of!(Tables, saved_rsp)) as i32), RSP);
    a.mov(RSP, RDI);
    a.rm(&[], false, &[0x0F, 0xAE], 3, state(table(offset_of!(Tables, host_mxcsr)))); // stmxcsr
    a.rm(&[], true, &[0x0F, 0xAE], 1, state(fx)); // fxrstor64
    if has_avx {
        a.raw(&VZEROUPPER); // whatever the program had there, it is not the guest's
    }
    let mut w = Writer { a, has_avx, below: 0 };
    w.upper_in();
    w.registers_in();
    a.raw(&[0x41, 0xFF, 0xE0 | (T0 & 7)]); // jmp T0

    g.exit = a.here();
    let mut w = Writer { a, has_avx, below: 0 };
    w.registers_out();
    w.vectors_out();
    g.exit_stored = a.here();
    leave(a, fx, has_avx);

    g.indirect = a.here();
    a.store(state(offset_of!(Core, rip)), T0);
    let mut w = Writer { a, has_avx, below: 0 };
    w.registers_out();
    w.vectors_out();
    w.call_helper(h.lookup);
    resume_or_leave(a, g.exit_stored, has_avx);

    // Called: the return address lies between the stack pointer and the state.
    g.fill = a.here();
    let mut w = Writer { a, has_avx, below: 8 };
    w.registers_out();
    w.vectors_out();
    w.a.mov(RSI, T0);
    w.a.mov(RDX, T1);
    w.call_helper(h.fill);
    w.test_rax();
    let failed = w.a.jcc_later(super::asm::cc::E);
    w.a.mov(T0, RAX);
    w.vectors_in();
    w.registers_in();
    w.a.raw(&[0xC3]);
    let here = w.a.here();
    w.a.patch(failed, here);
    w.a.load(RSI, at(RSP));
    w.a.rm(&[], false, &[0x8B], RSI, Mem::new(Some(RSI), None, AFTER_JUMP)); // mov esi, [rsi + 5]
    let to_step = w.a.jmp_later();

    g.step = a.here();
    let mut w = Writer { a, has_avx, below: 8 };
    w.registers_out();
    w.flags_out();
    w.vectors_out();
    w.a.mov(RSI, T1);
    let here = w.a.here();
    w.a.patch(to_step, here);
    w.call_helper(h.step);
    a.raw(&[0x48, 0x83, 0xC4, 8]); // drop the return address
    resume_or_leave(a, g.exit_stored, has_avx);

    g.time = a.here();
    let mut w = Writer { a, has_avx, below: 8 };
    w.registers_out();
    w.vectors_out();
    w.call_helper(h.time);
    w.a.mov(T1, RAX);
    w.vectors_in();
    w.registers_in();
    w.a.raw(&[0xC3]);

    write_flags(a, h, &mut g, has_avx);

    g.fault = a.here();
    let mut w = Writer { a, has_avx, below: 0 };
    w.registers_out();
    w.flags_out();
    w.vectors_out();
    w.a.mov(RSI, T0);
    w.a.mov(RDX, T1);
    w.call_helper(h.fault);
    resume_or_leave(a, g.exit_stored, has_avx);
    g
}

/// The pieces that make the record's flags: `flags` loads the operands into T1 and T0 and jumps
/// through a table, by kind and size, to the piece that does the operation.
fn write_flags(a: &mut Asm, h: Helpers, g: &mut Glue, has_avx: bool) {
    let below = 8; // the return address
    let field = |f: usize| shifted(state(offset_of!(Core, record) + f), below);
    let pointer = shifted(state(table(offset_of!(Tables, pointer))), below);
    let slow = a.here();
    a.load(T0, pointer);
    let mut w = Writer { a, has_avx, below };
    w.registers_out();
    w.vectors_out();
    w.call_helper(h.flags);
    w.vectors_in();
    w.registers_in();
    w.a.load(T0, pointer);
    w.a.raw(&[0xC3]);

    g.makers = [slow; MAKERS];
    for kind in [Kind::Saved, Kind::Sub, Kind::And, Kind::Logic, Kind::Added, Kind::Subtracted, Kind::Negated]
    {
        for size in [0, 1, 2, 4, 8] {
            if (kind == Kind::Saved) != (size == 0) {
                continue;
            }
            g.makers[kind as usize | size << 4] = a.here();
            if kind == Kind::Saved {
                a.load_flags(field(offset_of!(Record, saved)));
            } else {
                a.load(T1, field(offset_of!(Record, a)));
                super::flags::make(a, kind, size, Source::Register(T0));
            }
            a.load(T0, pointer);
            a.raw(&[0xC3]);
        }
    }

    g.flags = a.here();
    a.store(pointer, T0);
    a.load32(T1, field(offset_of!(Record, how)));
    a.load(T0, field(offset_of!(Record, b)));
    a.rr(false, &[0xF7], 0, T1); // test T1d, imm32
    a.raw(&B_INSIDE.to_le_bytes());
    let outside = a.jcc_later(super::asm::cc::E);
    a.rr(true, &[0x63], T0, T1); // movsxd T0, T1d
    a.rr(true, &[0xC1], 7, T0); // sar T0, 16
    a.raw(&[16]);
    let here = a.here();
    a.patch(outside, here);
    a.rr(false, &[0x0F, 0xB6], T1, T1); // movzx T1d, T1b
    let makers = table(offset_of!(Tables, makers)) as i32 + below;
    a.rm(&[], false, &[0xFF], 4, Mem::new(Some(RSP), Some((T1, 3)), makers)); // jmp [m]
}

/// RAX is where to go on, or 0 to leave; all state is stored.
fn resume_or_leave(a: &mut Asm, exit_stored: u64, has_avx: bool) {
    a.raw(&[0x48, 0x85, 0xC0]);
    a.jcc(super::asm::cc::E, exit_stored);
    a.mov(T0, RAX);
    let mut w = Writer { a, has_avx, below: 0 };
    w.vectors_in();
    w.registers_in();
    a.raw(&[0x41, 0xFF, 0xE0 | (T0 & 7)]);
}

/// Give the computer its own state back and return.
fn leave(a: &mut Asm, fx: usize, has_avx: bool) {
    // x87 state is live in the processor, XMM is stored (and may be newer in memory): reload it so
    // that one FXSAVE has everything.
    Writer { a, has_avx, below: 0 }.xmm(0x28);
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
