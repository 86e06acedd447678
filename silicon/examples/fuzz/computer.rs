//! The oracle: this computer's own processor, in a child process that does nothing else.
//!
//! The child maps the pages of a case at their addresses, takes cases from memory that it shares
//! with us, loads every register with IRETQ and comes back through a signal.  It may make no
//! system call that matters (seccomp), and it allocates nothing after the fork.

use std::arch::{asm, naked_asm};
use std::io;
use std::ptr::{self, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::time::{Duration, Instant};

use crate::case::*;

/// Cases handed over at once.
pub const BATCH: usize = 64;

#[repr(C, align(4096))]
struct Mailbox {
    /// 0: the child may sleep; 1: there is work; 2: there are results.
    state: AtomicU32,
    count: u64,
    memory: [u64; WORDS],
    starts: [Start; BATCH],
    outcomes: [Outcome; BATCH],
}

pub struct Computer {
    mailbox: *mut Mailbox,
    child: libc::pid_t,
}

/// Whether programs may set FS and GS bases (AT_HWCAP2 bit 1).
pub fn has_bases() -> bool {
    // SAFETY: a plain query.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

fn map(len: usize, prot: i32, flags: i32, at: u64, fd: i32) -> *mut u8 {
    // SAFETY: a new mapping; fixed places are checked to be free by the flag.
    let p = unsafe { libc::mmap(at as *mut _, len, prot, flags, fd, 0) };
    if p == libc::MAP_FAILED { ptr::null_mut() } else { p.cast() }
}

impl Computer {
    pub fn new() -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let mailbox = map(size_of::<Mailbox>(), prot, libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0, -1);
        if mailbox.is_null() {
            return Err(io::Error::last_os_error());
        }
        let mut c = Self { mailbox: mailbox.cast(), child: 0 };
        c.fork()?;
        Ok(c)
    }

    fn fork(&mut self) -> io::Result<()> {
        // SAFETY: the child runs `serve`, which uses nothing that another thread may have locked.
        unsafe {
            (*self.mailbox).state.store(0, Release);
            let parent = libc::getpid();
            match libc::fork() {
                -1 => Err(io::Error::last_os_error()),
                0 => {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    if libc::getppid() == parent {
                        serve(self.mailbox);
                    }
                    libc::_exit(9)
                }
                child => {
                    self.child = child;
                    Ok(())
                }
            }
        }
    }

    /// Run cases (at most `BATCH`) that all begin with this memory.  A case that killed the child
    /// has the outcome `NOTHING`, and so have those after it; one that takes seconds is given up, as they are: a
    /// locked access to two lines takes a millisecond where the system slows such programs down.
    pub fn run(&mut self, memory: &[u64], starts: &[Start]) -> io::Result<&[Outcome]> {
        // SAFETY: the mailbox is ours while its state is not 1.
        unsafe {
            let m = &mut *self.mailbox;
            m.count = starts.len() as u64;
            m.memory.copy_from_slice(memory);
            m.starts[..starts.len()].copy_from_slice(starts);
            m.outcomes[..starts.len()].fill(Outcome::NOTHING);
            m.state.store(1, Release);
            futex(&m.state, libc::FUTEX_WAKE, 1);
            let begin = Instant::now();
            while m.state.load(Acquire) == 1 {
                futex(&m.state, libc::FUTEX_WAIT, 1);
                if m.state.load(Acquire) == 2 {
                    break;
                }
                let mut status = 0;
                let is_late = begin.elapsed() > Duration::from_secs(5);
                if is_late {
                    libc::kill(self.child, libc::SIGKILL);
                }
                if libc::waitpid(self.child, &raw mut status, if is_late { 0 } else { libc::WNOHANG })
                    == self.child
                {
                    self.fork()?;
                    if is_late {
                        for lost in m.outcomes[..starts.len()].iter_mut().filter(|o| o.vector == LOST) {
                            lost.vector = RUNAWAY;
                        }
                    }
                    break;
                }
            }
            Ok(&(&(*self.mailbox).outcomes)[..starts.len()])
        }
    }
}

impl Drop for Computer {
    fn drop(&mut self) {
        // SAFETY: our own child and mapping.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, ptr::null_mut(), 0);
            libc::munmap(self.mailbox.cast(), size_of::<Mailbox>());
        }
    }
}

/// Wait at most half a second while the word is `value`, or wake whoever waits.
unsafe fn futex(word: &AtomicU32, op: i32, value: u32) {
    let patience = libc::timespec { tv_sec: 0, tv_nsec: 500_000_000 };
    // SAFETY: a live word and a live timespec.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, &raw const patience) };
}

/// What the child keeps: plain statics, since a signal comes back to them.
static mut HARNESS_RSP: u64 = 0;
static mut HARNESS_FS: u64 = 0;
static mut HAS_AVX: u64 = 0;
static mut OUTCOME: *mut Outcome = ptr::null_mut();

/// The child's life.
unsafe fn serve(mailbox: *mut Mailbox) {
    // SAFETY: the child is alone; fixed mappings lie where nothing else is (checked by the flag).
    unsafe {
        let Some((code, pages)) = map_pages() else { libc::_exit(3) };
        ptr::write_bytes(code, 0xCC, CODE_PAGES * PAGE);
        install();
        if seccomp() != 0 {
            libc::_exit(4);
        }
        HAS_AVX = is_x86_feature_detected!("avx").into();
        if has_bases() {
            let fs: u64;
            asm!("rdfsbase {}", out(reg) fs);
            HARNESS_FS = fs;
        }
        let m = &mut *mailbox;
        loop {
            while m.state.load(Acquire) != 1 {
                let now = m.state.load(Acquire);
                if now != 1 {
                    futex(&m.state, libc::FUTEX_WAIT, now);
                }
            }
            ptr::copy_nonoverlapping(m.memory.as_ptr(), pages, WORDS);
            for i in 0..m.count as usize {
                let start = &m.starts[i];
                let at = code.add(start.place() as usize);
                let n = start.code_len as usize;
                ptr::copy_nonoverlapping(start.code.as_ptr(), at, n);
                OUTCOME = &raw mut m.outcomes[i];
                go(start);
                ptr::write_bytes(at, 0xCC, n);
                let outcome = &mut *OUTCOME;
                for w in 0..WORDS {
                    let now = pages.add(w).read_volatile();
                    if now != m.memory[w] {
                        outcome.note(w, now);
                        pages.add(w).write_volatile(m.memory[w]);
                    }
                }
            }
            m.state.store(2, Release);
            futex(&m.state, libc::FUTEX_WAKE, 1);
        }
    }
}

/// Map the case's pages, and again where they can be written: code, then the rest in order.
unsafe fn map_pages() -> Option<(*mut u8, *mut u64)> {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    let shared = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: fresh descriptors and mappings.
    unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), 0);
        let len = BYTES + CODE_PAGES * PAGE;
        if fd < 0 || libc::ftruncate(fd, len as i64) != 0 {
            return None;
        }
        let all = map(len, rw, shared, 0, fd);
        let place = |at: u64, pages: usize, prot: i32, offset: usize| {
            let p = libc::mmap(at as *mut _, pages * PAGE, prot, fixed, fd, offset as i64);
            p as u64 == at
        };
        let mut ok = !all.is_null();
        for by in ALIASES {
            for (i, (at, writable)) in PAGES.iter().enumerate() {
                ok &= place(by + *at, 1, if *writable { rw } else { libc::PROT_READ }, i * PAGE);
            }
            ok &= place(by + CODE, CODE_PAGES, libc::PROT_READ | libc::PROT_EXEC, BYTES);
        }
        ok.then(|| (all.add(BYTES), all.cast()))
    }
}

const SIGNALS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

unsafe fn install() {
    // SAFETY: an alternate stack and handlers that stay for the life of the child.
    unsafe {
        let size = 64 << 10;
        let stack = libc::stack_t {
            ss_sp: map(
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                0,
                -1,
            )
            .cast(),
            ss_flags: 0,
            ss_size: size,
        };
        libc::sigaltstack(&raw const stack, ptr::null_mut());
        for s in SIGNALS {
            let mut a: libc::sigaction = std::mem::zeroed();
            a.sa_sigaction = on_signal as *const () as usize;
            a.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(s, &raw const a, ptr::null_mut());
        }
    }
}

/// Allow only what `serve` needs after this; anything else is SIGSYS.
unsafe fn seccomp() -> i32 {
    const ARCH: u32 = 0xC000_003E; // AUDIT_ARCH_X86_64
    let stmt = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut program = [
        stmt(load, 4),
        jump(ARCH, 0, 5),
        stmt(load, 0),
        jump(libc::SYS_rt_sigreturn as u32, 4, 0),
        jump(libc::SYS_futex as u32, 3, 0),
        jump(libc::SYS_restart_syscall as u32, 2, 0),
        jump(libc::SYS_exit_group as u32, 1, 0),
        stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP),
        stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a well-formed program.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
    }
}

/// Load everything and go; `resume` comes back.
#[unsafe(naked)]
unsafe extern "sysv64" fn go(start: *const Start) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {rsp}], rsp",
        "fxrstor64 [rdi + {fx}]",
        "cmp qword ptr [rip + {avx}], 0",
        "je 3f",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vinsertf128 ymm\\n, ymm\\n, [rdi + {upper} + 16 * \\n], 1",
        ".endr",
        "3:",
        "cmp qword ptr [rip + {fs}], 0",
        "je 2f",
        "mov rax, [rdi + {fs_base}]", "wrfsbase rax",
        "mov rax, [rdi + {gs_base}]", "wrgsbase rax",
        "2:",
        "mov eax, [rdi + {ds}]", "mov ds, eax", "mov es, eax",
        "lea rsp, [rdi + {rip}]",
        "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "iretq",
        rsp = sym HARNESS_RSP,
        fs = sym HARNESS_FS,
        avx = sym HAS_AVX,
        fx = const Start::FX,
        upper = const Start::UPPER,
        fs_base = const Start::FS_BASE,
        gs_base = const Start::GS_BASE,
        ds = const Start::DS,
        rip = const Start::RIP,
    )
}

/// Where a signal's return goes on: the harness's stack pointer is there again.
#[unsafe(naked)]
unsafe extern "sysv64" fn resume() {
    naked_asm!(
        // sigreturn leaves NT and ID as the case left them
        "push 0x202",
        "popfq",
        "push 0x1F80",
        "ldmxcsr [rsp]",
        "add rsp, 8",
        "fninit",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// The handler: put right what a case may have bent, then note the outcome.
#[unsafe(naked)]
unsafe extern "sysv64" fn on_signal() {
    naked_asm!(
        "pushfq", "and dword ptr [rsp], 0xFFFBFFFF", "popfq", // AC
        "mov rax, [rip + {fs}]", "test rax, rax", "je 2f", "wrfsbase rax",
        "2:",
        "jmp {note}",
        fs = sym HARNESS_FS,
        note = sym note,
    )
}

/// The upper halves in a signal's frame, which has an area of XSAVE if Linux says so.
unsafe fn upper_in(area: *const u8) -> Upper {
    const MARK: u32 = 0x4650_5853; // FP_XSTATE_MAGIC1
    // SAFETY: the frame has an FXSAVE image, and the rest if that has the mark.
    unsafe {
        let has_rest = area.add(464).cast::<u32>().read_unaligned() == MARK;
        let in_use = if has_rest { area.add(512).cast::<u64>().read_unaligned() } else { 0 };
        if in_use & 4 == 0 { [[0; 16]; 16] } else { area.add(576).cast::<Upper>().read_unaligned() }
    }
}

unsafe extern "sysv64" fn note(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel's context; OUTCOME is set while a case runs.
    unsafe {
        let outcome = &mut *addr_of!(OUTCOME).read();
        let c = &mut (*context).uc_mcontext;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (i, r) in order.iter().enumerate() {
            outcome.gpr[i] = c.gregs[*r as usize] as u64;
        }
        outcome.rip = c.gregs[libc::REG_RIP as usize] as u64;
        outcome.rflags = c.gregs[libc::REG_EFL as usize] as u64;
        outcome.vector =
            if signal == libc::SIGSYS { SYSTEM_CALL } else { c.gregs[libc::REG_TRAPNO as usize] as u32 };
        outcome.error = c.gregs[libc::REG_ERR as usize] as u32;
        outcome.cr2 = if outcome.vector == 14 { c.gregs[libc::REG_CR2 as usize] as u64 } else { 0 };
        ptr::copy_nonoverlapping(c.fpregs.cast::<u8>(), outcome.fx.0.as_mut_ptr(), 416);
        outcome.upper = upper_in(c.fpregs.cast());
        c.gregs[libc::REG_RIP as usize] = resume as *const () as i64;
        c.gregs[libc::REG_RSP as usize] = addr_of_mut!(HARNESS_RSP).read() as i64;
        c.gregs[libc::REG_EFL as usize] = 0x202;
        // CS and SS of 64-bit programs; the upper half of the word holds SS
        let segments = c.gregs[libc::REG_CSGSFS as usize] as u64;
        c.gregs[libc::REG_CSGSFS as usize] = (segments & 0x0000_FFFF_FFFF_0000 | CS64 | SS << 48) as i64;
    }
}
