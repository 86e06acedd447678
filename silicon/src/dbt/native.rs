//! Running single guest instructions on the computer's own processor, and recovering from the
//! faults that generated code meets.
//!
//! *Faults.*  [`register`] names a range of generated code and an address to go on at.  When a
//! synchronous signal (SIGSEGV, SIGBUS, SIGFPE, SIGILL) hits inside a range, its R14 receives the
//! faulting RIP (and, if asked for, R15 the exception's vector) and execution goes on there;
//! every other signal goes to whoever handled it before.
//!
//! *Thunks.*  A [`Thunks`] holds copied instructions, each followed by RET, in pages that are
//! mapped twice: to write and to execute.  [`Thunks::call`] runs one with the guest's x87/SSE state
//! loaded.  A copied instruction touches only x87/SSE registers, RAX, RCX, RDX, RBX and memory at
//! RDI, where its operand has been put.

use std::arch::naked_asm;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering::*};

use crate::cpu::state::Fx;

/// Most ranges at one time (two for each processor).
const SLOTS: usize = 4096;
/// A slot that is being filled.
const BUSY: usize = 1;

struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    recover: AtomicUsize,
    wants_vector: AtomicUsize,
}

#[allow(clippy::declare_interior_mutable_const)] // the initial value of each slot
const FREE: Slot = Slot {
    start: AtomicUsize::new(0),
    end: AtomicUsize::new(0),
    recover: AtomicUsize::new(0),
    wants_vector: AtomicUsize::new(0),
};
static TABLE: [Slot; SLOTS] = [FREE; SLOTS];
/// One past the highest slot ever used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// A registered range; dropping it ends the registration.
#[derive(Debug)]
pub struct Registration(usize);

impl Drop for Registration {
    fn drop(&mut self) {
        TABLE[self.0].start.store(0, Release);
    }
}

/// Go on at `recover`, with the faulting RIP in R14, when code in `range` faults.
///
/// The recovery code runs with every other register, the flags and the x87/SSE state as they
/// were at the fault.  The first registration installs the signal handlers.
///
/// # Errors
/// If the table is full.
pub fn register(range: Range<usize>, recover: usize) -> io::Result<Registration> {
    register_as(range, recover, false)
}

fn register_as(range: Range<usize>, recover: usize, wants_vector: bool) -> io::Result<Registration> {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| SIGNALS.iter().zip(&PREVIOUS).for_each(|(&s, p)| install(s, p)));
    for (i, slot) in TABLE.iter().enumerate() {
        if slot.start.compare_exchange(0, BUSY, AcqRel, Relaxed).is_ok() {
            slot.end.store(range.end, Relaxed);
            slot.recover.store(recover, Relaxed);
            slot.wants_vector.store(usize::from(wants_vector), Relaxed);
            slot.start.store(range.start, Release);
            USED.fetch_max(i + 1, AcqRel);
            return Ok(Registration(i));
        }
    }
    Err(io::Error::other("no room for another range of generated code: use fewer processors"))
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// The handlers before ours: written once, before ours are installed.
struct Previous(std::cell::UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written under `Once`, read only by handlers installed after that.
unsafe impl Sync for Previous {}
static PREVIOUS: [Previous; 4] = [const { Previous(std::cell::UnsafeCell::new(MaybeUninit::zeroed())) }; 4];

fn install(signal: libc::c_int, previous: &Previous) {
    // SAFETY: the old action is stored before the new one can run; the action is fully set up.
    unsafe {
        let old = (*previous.0.get()).as_mut_ptr();
        libc::sigaction(signal, ptr::null(), old);
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = on_fault as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut new.sa_mask);
        libc::sigaction(signal, &raw const new, ptr::null_mut());
    }
}

/// The slot whose range holds `rip`: where to go on, and whether the vector is wanted.
fn find(rip: usize) -> Option<(usize, bool)> {
    TABLE[..USED.load(Acquire).min(SLOTS)].iter().find_map(|slot| {
        let start = slot.start.load(Acquire);
        let inside = start > BUSY && (start..slot.end.load(Relaxed)).contains(&rip);
        let answer = (slot.recover.load(Relaxed), slot.wants_vector.load(Relaxed) != 0);
        (inside && slot.start.load(Acquire) == start).then_some(answer)
    })
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context to a SA_SIGINFO handler.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = gregs[libc::REG_RIP as usize];
    if let Some((recover, wants_vector)) = find(rip as usize) {
        gregs[libc::REG_R14 as usize] = rip;
        if wants_vector {
            gregs[libc::REG_R15 as usize] = gregs[libc::REG_TRAPNO as usize];
        }
        gregs[libc::REG_RIP as usize] = recover as i64;
        return;
    }
    pass_on(signal, info, context);
}

/// Let the handler that was there before ours deal with it.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(i) = SIGNALS.iter().position(|&s| s == signal) else { return };
    // SAFETY: stored before this handler was installed.
    let old = unsafe { (*PREVIOUS[i].0.get()).assume_init_ref() };
    match old.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction faults again and has its ordinary effect.
            // SAFETY: puts back a valid action.
            unsafe { libc::sigaction(signal, old, ptr::null_mut()) };
        }
        f if old.sa_flags & libc::SA_SIGINFO != 0 => {
            type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: that is what a handler with SA_SIGINFO is.
            unsafe { std::mem::transmute::<usize, Full>(f)(signal, info, context) }
        }
        f => {
            // SAFETY: that is what a handler without SA_SIGINFO is.
            unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(f)(signal) }
        }
    }
}

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
    /// Everything.
    All,
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

unsafe extern "C" {
    fn understudy_recover_all();
    fn understudy_recover_sse();
}

/// Bytes of code for each [`Reach`].
const AREA: usize = 256 << 10;
/// Room for one instruction and RET.
const ROOM: usize = 16;

/// Pages of copied instructions: the first half for [`Reach::Sse`], the second for
/// [`Reach::All`].
#[derive(Debug)]
pub struct Thunks {
    writable: *mut u8,
    executable: *mut u8,
    used: [usize; 2],
    _registrations: [Registration; 2],
}

// SAFETY: the mappings belong to the value alone.
unsafe impl Send for Thunks {}

impl Thunks {
    /// Make room.
    ///
    /// # Errors
    /// If the computer gives no executable memory.
    pub fn new() -> io::Result<Self> {
        let len = 2 * AREA;
        // SAFETY: two fresh mappings of a fresh memfd, owned by the value.
        let (writable, executable) = unsafe {
            let fd = libc::memfd_create(c"understudy-thunks".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, len as i64) != 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |prot| libc::mmap(ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0);
            let w = map(libc::PROT_READ | libc::PROT_WRITE);
            let x = map(libc::PROT_READ | libc::PROT_EXEC);
            let e = io::Error::last_os_error();
            libc::close(fd);
            if w == libc::MAP_FAILED || x == libc::MAP_FAILED {
                return Err(e);
            }
            (w.cast::<u8>(), x.cast::<u8>())
        };
        let x = executable as usize;
        let registrations = [
            register_as(x..x + AREA, understudy_recover_sse as *const () as usize, true)?,
            register_as(x + AREA..x + len, understudy_recover_all as *const () as usize, true)?,
        ];
        Ok(Self { writable, executable, used: [0; 2], _registrations: registrations })
    }

    /// Add an instruction (at most 15 bytes).  `None`: the area is full.
    ///
    /// # Panics
    /// If the instruction is longer.
    pub fn add(&mut self, reach: Reach, bytes: &[u8]) -> Option<usize> {
        assert!(bytes.len() < ROOM);
        let half = reach as usize;
        let at = self.used[half];
        if at + ROOM > AREA {
            return None;
        }
        self.used[half] += ROOM;
        let offset = half * AREA + at;
        // SAFETY: inside the mapping; nobody executes this place yet.
        unsafe {
            let p = self.writable.add(offset);
            ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len());
            p.add(bytes.len()).write(0xC3); // RET
        }
        Some(offset)
    }

    /// Forget every instruction.
    pub fn clear(&mut self) {
        self.used = [0; 2];
    }

    /// Run the instruction that [`Thunks::add`] put at `offset`.
    ///
    /// # Panics
    /// If there is none.
    pub fn call(&self, offset: usize, frame: &mut Frame, fx: &mut Fx) {
        let half = offset / AREA;
        assert!(offset.is_multiple_of(ROOM) && offset % AREA < self.used[half]);
        fx.set_mxcsr(fx.mxcsr());
        // SAFETY: a copied instruction, which by the contract of this module touches only the
        // frame's operand (RDI, the frame's first bytes) and the registers that the entry code
        // loads, saves and puts back.  FXRSTOR and LDMXCSR get an MXCSR without reserved bits.
        unsafe {
            let code = self.executable.add(offset);
            if half == Reach::Sse as usize {
                enter_sse(frame, code, fx);
            } else {
                enter_all(frame, code, fx);
            }
        }
    }
}

impl Drop for Thunks {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody runs them any more.
        unsafe {
            libc::munmap(self.writable.cast(), 2 * AREA);
            libc::munmap(self.executable.cast(), 2 * AREA);
        }
    }
}
