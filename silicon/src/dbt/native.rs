//! Running single guest instructions on the computer's own processor.
//!
//! A [`Thunks`] holds copied instructions, each followed by RET, in pages that are
//! mapped twice: to write and to execute.  [`Thunks::call`] runs one with the guest's x87/SSE/AVX state
//! loaded.  A copied instruction touches only those registers, RAX, RCX, RDX, RBX and memory at
//! RDI, where its operand has been put.

use std::arch::naked_asm;
use std::io;
use std::mem::offset_of;
use std::ptr;

use super::signals::{Registration, register};
use super::twin::{Twin, serialize};
use crate::cpu::state::Fx;
use crate::cpu::upper::{Halves, Upper};

/// What a copied instruction starts from and leaves.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its memory operand.
    pub memory: [u8; 128],
    /// RAX, RCX, RDX, RBX.
    pub gpr: [u64; 4],
    /// The arithmetic flags.
    pub flags: u64,
    /// Vector of the exception it raised plus one; 0: none.
    pub fault: u64,
}

impl Default for Frame {
    fn default() -> Self {
        Self { memory: [0; 128], gpr: [0; 4], flags: 0, fault: 0 }
    }
}

/// How much of the x87/SSE state a copied instruction needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// XMM registers and MXCSR.
    Sse,
    /// The x87 registers, too.
    All,
    /// YMM registers and MXCSR.
    Avx,
}

/// Run the code at RSI with the frame at RDI and the state at RDX: all of it.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_all(frame: *mut Frame, code: *const u8, fx: *mut Fx) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "sub rsp, 24",
        "mov r12, rdi", "mov r13, rdx",
        "stmxcsr [rsp]", "fnstcw [rsp + 4]",
        "fxrstor64 [r13]",
        "mov rbp, rsi",
        "mov rax, [r12 + {gpr}]", "mov rcx, [r12 + {gpr} + 8]",
        "mov rdx, [r12 + {gpr} + 16]", "mov rbx, [r12 + {gpr} + 24]",
        "push [r12 + {flags}]", "popfq",
        "mov r15, -1",
        "call rbp",
        "2:",
        "mov [r12 + {gpr}], rax", "mov [r12 + {gpr} + 8], rcx",
        "mov [r12 + {gpr} + 16], rdx", "mov [r12 + {gpr} + 24], rbx",
        "pushfq", "pop [r12 + {flags}]",
        "inc r15", "mov [r12 + {fault}], r15",
        "fxsave64 [r13]",
        "fninit", "fldcw [rsp + 4]", "ldmxcsr [rsp]",
        "add rsp, 24", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
        // Where a fault goes on: inside the call.
        ".globl understudy_recover_all", ".hidden understudy_recover_all",
        "understudy_recover_all:",
        "lea rsp, [rsp + 8]", "jmp 2b",
        gpr = const offset_of!(Frame, gpr),
        flags = const offset_of!(Frame, flags),
        fault = const offset_of!(Frame, fault),
    )
}

/// As [`enter_all`], for an instruction that knows nothing of the x87 and MMX registers.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_sse(frame: *mut Frame, code: *const u8, fx: *mut Fx) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "sub rsp, 24",
        "mov r12, rdi", "mov r13, rdx",
        "stmxcsr [rsp]", "ldmxcsr [r13 + 24]",
        "movaps xmm0, [r13 + 160]", "movaps xmm1, [r13 + 176]",
        "movaps xmm2, [r13 + 192]", "movaps xmm3, [r13 + 208]",
        "movaps xmm4, [r13 + 224]", "movaps xmm5, [r13 + 240]",
        "movaps xmm6, [r13 + 256]", "movaps xmm7, [r13 + 272]",
        "movaps xmm8, [r13 + 288]", "movaps xmm9, [r13 + 304]",
        "movaps xmm10, [r13 + 320]", "movaps xmm11, [r13 + 336]",
        "movaps xmm12, [r13 + 352]", "movaps xmm13, [r13 + 368]",
        "movaps xmm14, [r13 + 384]", "movaps xmm15, [r13 + 400]",
        "mov rbp, rsi",
        "mov rax, [r12 + {gpr}]", "mov rcx, [r12 + {gpr} + 8]",
        "mov rdx, [r12 + {gpr} + 16]", "mov rbx, [r12 + {gpr} + 24]",
        "push [r12 + {flags}]", "popfq",
        "mov r15, -1",
        "call rbp",
        "2:",
        "mov [r12 + {gpr}], rax", "mov [r12 + {gpr} + 8], rcx",
        "mov [r12 + {gpr} + 16], rdx", "mov [r12 + {gpr} + 24], rbx",
        "pushfq", "pop [r12 + {flags}]",
        "inc r15", "mov [r12 + {fault}], r15",
        "movaps [r13 + 160], xmm0", "movaps [r13 + 176], xmm1",
        "movaps [r13 + 192], xmm2", "movaps [r13 + 208], xmm3",
        "movaps [r13 + 224], xmm4", "movaps [r13 + 240], xmm5",
        "movaps [r13 + 256], xmm6", "movaps [r13 + 272], xmm7",
        "movaps [r13 + 288], xmm8", "movaps [r13 + 304], xmm9",
        "movaps [r13 + 320], xmm10", "movaps [r13 + 336], xmm11",
        "movaps [r13 + 352], xmm12", "movaps [r13 + 368], xmm13",
        "movaps [r13 + 384], xmm14", "movaps [r13 + 400], xmm15",
        "stmxcsr [r13 + 24]", "ldmxcsr [rsp]",
        "add rsp, 24", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
        ".globl understudy_recover_sse", ".hidden understudy_recover_sse",
        "understudy_recover_sse:",
        "lea rsp, [rsp + 8]", "jmp 2b",
        gpr = const offset_of!(Frame, gpr),
        flags = const offset_of!(Frame, flags),
        fault = const offset_of!(Frame, fault),
    )
}

/// As [`enter_sse`], with the upper halves at RCX.  (VZEROUPPER: Rust's code is made of SSE.)
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_avx(frame: *mut Frame, code: *const u8, fx: *mut Fx, upper: *mut Halves) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "sub rsp, 24",
        "mov r12, rdi", "mov r13, rdx", "mov [rsp + 8], rcx",
        "stmxcsr [rsp]", "ldmxcsr [r13 + 24]",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovaps xmm\\n, [r13 + 160 + 16 * \\n]",
        "vinsertf128 ymm\\n, ymm\\n, [rcx + 16 * \\n], 1",
        ".endr",
        "mov rbp, rsi",
        "mov rax, [r12 + {gpr}]", "mov rcx, [r12 + {gpr} + 8]",
        "mov rdx, [r12 + {gpr} + 16]", "mov rbx, [r12 + {gpr} + 24]",
        "push [r12 + {flags}]", "popfq",
        "mov r15, -1",
        "call rbp",
        "2:",
        "mov [r12 + {gpr}], rax", "mov [r12 + {gpr} + 8], rcx",
        "mov [r12 + {gpr} + 16], rdx", "mov [r12 + {gpr} + 24], rbx",
        "pushfq", "pop [r12 + {flags}]",
        "inc r15", "mov [r12 + {fault}], r15",
        "mov rbp, [rsp + 8]",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovaps [r13 + 160 + 16 * \\n], xmm\\n",
        "vextractf128 [rbp + 16 * \\n], ymm\\n, 1",
        ".endr",
        "vzeroupper",
        "stmxcsr [r13 + 24]", "ldmxcsr [rsp]",
        "add rsp, 24", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
        ".globl understudy_recover_avx", ".hidden understudy_recover_avx",
        "understudy_recover_avx:",
        "lea rsp, [rsp + 8]", "jmp 2b",
        gpr = const offset_of!(Frame, gpr),
        flags = const offset_of!(Frame, flags),
        fault = const offset_of!(Frame, fault),
    )
}

unsafe extern "C" {
    fn understudy_recover_all();
    fn understudy_recover_sse();
    fn understudy_recover_avx();
}

/// Bytes of code for each [`Reach`].
const AREA: usize = 256 << 10;
/// Room for one instruction and RET.
const ROOM: usize = 16;

/// Ways to call a copied instruction: the kinds of [`Reach`].
const REACHES: usize = 3;

/// Pages of copied instructions: an area for each [`Reach`], in order.
#[derive(Debug)]
pub struct Thunks {
    twin: Twin,
    used: [usize; REACHES],
    _registrations: [Registration; REACHES],
}

impl Thunks {
    /// Make room.
    ///
    /// # Errors
    /// If the computer gives no executable memory.
    pub fn new() -> io::Result<Self> {
        let twin = Twin::new(REACHES * AREA)?;
        let x = twin.executable() as usize;
        let area = |reach: Reach, recover: unsafe extern "C" fn()| {
            let at = x + reach as usize * AREA;
            register(at..at + AREA, recover as *const () as usize, true)
        };
        let registrations = [
            area(Reach::Sse, understudy_recover_sse)?,
            area(Reach::All, understudy_recover_all)?,
            area(Reach::Avx, understudy_recover_avx)?,
        ];
        Ok(Self { twin, used: [0; REACHES], _registrations: registrations })
    }

    /// Add an instruction (at most 15 bytes).  `None`: the area is full.
    ///
    /// # Panics
    /// If the instruction is longer.
    pub fn add(&mut self, reach: Reach, bytes: &[u8]) -> Option<usize> {
        assert!(bytes.len() < ROOM);
        let area = reach as usize;
        let at = self.used[area];
        if at + ROOM > AREA {
            return None;
        }
        self.used[area] += ROOM;
        let offset = area * AREA + at;
        // SAFETY: inside the mapping; nobody executes this place yet.
        unsafe {
            let p = self.twin.writable().add(offset);
            ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len());
            p.add(bytes.len()).write(0xC3); // RET
        }
        serialize();
        Some(offset)
    }

    /// Forget every instruction.
    pub fn clear(&mut self) {
        self.used = [0; REACHES];
    }

    /// Run the instruction that [`Thunks::add`] put at `offset`.
    ///
    /// # Panics
    /// If there is none.
    pub fn call(&self, offset: usize, frame: &mut Frame, fx: &mut Fx, upper: &mut Upper) {
        const SSE: usize = Reach::Sse as usize;
        const AVX: usize = Reach::Avx as usize;
        let area = offset / AREA;
        assert!(offset.is_multiple_of(ROOM) && offset % AREA < self.used[area]);
        fx.set_mxcsr(fx.mxcsr());
        // SAFETY: a copied instruction, which by the contract of this module touches only the
        // frame's operand (RDI, the frame's first bytes) and the registers that the entry code
        // loads, saves and puts back.  FXRSTOR and LDMXCSR get an MXCSR without reserved bits.
        unsafe {
            let code = self.twin.executable().add(offset);
            match area {
                SSE => enter_sse(frame, code, fx),
                AVX => upper.change(|halves| enter_avx(frame, code, fx, halves)),
                _ => enter_all(frame, code, fx),
            }
        }
    }
}
