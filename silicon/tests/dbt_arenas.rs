//! Windows of 64-bit programs: what they do, and what is counted, is what it is without; and however
//! they compute addresses, they stay in their memory.

mod arena_bed;
mod counters;

use std::sync::PoisonError;

use arena_bed::{ALONE, LIBRARY, LOW, OTHER, PIE, STACK, edges, machine, memory_of, run, seen, system_calls};
use counters::counter;
use silicon::arch::segment::seg;
use silicon::dbt::promotion::Windows;
use silicon::processor::{EngineKind, Processor};

/// For ever: RDI, RSI, R14 are pointers to data in three arenas and beside them, by turns; RBX counts.
const PROGRAM: &[u8] = &[
    0x48, 0xFF, 0xC3, // again: inc rbx
    0x49, 0x87, 0xFE, // xchg r14, rdi
    0x48, 0x87, 0xFE, // xchg rsi, rdi
    0x53, // push rbx
    0xE8, 0x16, 0, 0, 0, // call f
    0x41, 0x5F, // pop r15
    0x48, 0x89, 0xE0, // mov rax, rsp
    0x48, 0x8D, 0x66, 0x78, // lea rsp, [rsi + 78h]: elsewhere, mostly
    0x50, // push rax
    0x5C, // pop rsp
    0x48, 0x83, 0xEC, 0x28, // sub rsp, 28h
    0x48, 0x83, 0xC4, 0x28, // add rsp, 28h
    0xEB, 0xDC, // jmp again
    0x90, 0x90, // f:
    0x55, // push rbp
    0x48, 0x89, 0xE5, // mov rbp, rsp
    0x48, 0x83, 0xE4, 0xE0, // and rsp, -32
    0x48, 0x89, 0x5C, 0x24, 0xF8, // mov [rsp - 8], rbx
    0x48, 0x8B, 0x07, // mov rax, [rdi]
    0x48, 0x01, 0x5F, 0x08, // add [rdi + 8], rbx
    0x73, 0x03, // jnc over
    0x48, 0xFF, 0xC0, // inc rax
    0x0F, 0xB6, 0xCB, // over: movzx ecx, bl
    0x48, 0x89, 0x44, 0xCF, 0x10, // mov [rdi + rcx * 8 + 10h], rax
    0x48, 0x63, 0xD3, // movsxd rdx, ebx
    0x83, 0xE2, 0x7F, // and edx, 7Fh
    0x48, 0xF7, 0xDA, // neg rdx
    0x48, 0x33, 0x84, 0xD6, 0, 0x08, 0, 0, // xor rax, [rsi + rdx * 8 + 800h]
    0x88, 0xA6, 0, 0x10, 0, 0, // mov [rsi + 1000h], ah
    0x4D, 0x11, 0x76, 0x18, // adc [r14 + 18h], r14
    0x49, 0x8B, 0x46, 0x18, // mov rax, [r14 + 18h]
    0x48, 0xC1, 0xE8, 0x3A, // shr rax, 58
    0xF3, 0x0F, 0x7E, 0x04, 0x06, // movq xmm0, [rsi + rax]
    0x66, 0x0F, 0xD6, 0x47, 0x28, // movq [rdi + 28h], xmm0
    0x64, 0x48, 0x03, 0x04, 0x25, 0x30, 0, 0, 0,    // add rax, [fs:30h]
    0xC9, // leave
    0xC3, // ret
];

fn pointed(mut p: Processor) -> Processor {
    (p.core.gpr[7], p.core.gpr[6], p.core.gpr[14]) = (PIE + 0x10_2000, LOW + 0x10_4000, LIBRARY + 0x10_6000);
    p
}

#[test]
fn nothing_but_speed_depends_on_windows() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kinds = [EngineKind::Reference, EngineKind::Dbt, EngineKind::Dbt, EngineKind::Dbt];
    let windows = [Windows::Never, Windows::Never, Windows::Always, Windows::Auto];
    for at in [LOW, PIE, LIBRARY] {
        for budget in [7, 1009, 300_000] {
            let pair = kinds.into_iter().zip(windows);
            let mut all: Vec<_> = pair.map(|(k, w)| pointed(machine(k, w, at, PROGRAM))).collect();
            for turn in 0..4 {
                for p in &mut all {
                    run(p, budget);
                }
                let expected = seen(&mut all[0]);
                for (i, p) in all.iter_mut().enumerate() {
                    assert_eq!(expected, seen(p), "at {at:#x}, budget {budget}, turn {turn}, processor {i}");
                }
                // The last one's change all the time; and the data's place.
                all[3].use_windows([Windows::Always, Windows::Never, Windows::Auto][turn % 3]);
                for p in &mut all {
                    p.core.gpr[6] = [OTHER, LOW, LIBRARY, PIE][turn] + 0x10_4000;
                }
            }
            assert_eq!(0, counter(&all[1], "windows_opened"));
            assert!(counter(&all[2], "windows_opened") > 0);
        }
    }
}

/// Every form of operand that is lowered apart, with one register as base (RBX) and one as index (RCX).
const FORMS: [&[u8]; 12] = [
    &[0x48, 0x8B, 0x03],                                  // mov rax, [rbx]
    &[0x48, 0x89, 0x83, 0, 0, 0, 0x80],                   // mov [rbx - 80000000h], rax
    &[0x48, 0x8B, 0x83, 0xFF, 0xFF, 0xFF, 0x7F],          // mov rax, [rbx + 7FFFFFFFh]
    &[0x89, 0xC9, 0x48, 0x8B, 0x04, 0xCB],                // mov ecx, ecx; mov rax, [rbx + rcx * 8]
    &[0x48, 0x63, 0xC9, 0x48, 0x89, 0x04, 0xCB],          // movsxd rcx, ecx; mov [rbx + rcx * 8], rax
    &[0x48, 0x8B, 0x04, 0x0B],                            // mov rax, [rbx + rcx]
    &[0x89, 0xC9, 0x48, 0x89, 0x04, 0xCD, 0, 0, 0x40, 0], // mov ecx, ecx; mov [rcx * 8 + 400000h], rax
    &[0x48, 0x89, 0xDC, 0x50, 0x50],                      // mov rsp, rbx; push rax; push rax
    &[0x48, 0x89, 0xDD, 0xC9],                            // mov rbp, rbx; leave
    &[0x48, 0x81, 0xEC, 0xFF, 0xFF, 0xFF, 0x7F, 0x50],    // sub rsp, 7FFFFFFFh; push rax
    &[0x48, 0x29, 0xCC, 0x50],                            // sub rsp, rcx; push rax
    &[0xF2, 0x0F, 0x10, 0x83, 0xF8, 0xFF, 0xFF, 0xFF],    // movsd xmm0, [rbx - 8]
];

/// What one access leaves: where the program is, what it faulted with, what is in its memory.
#[test]
fn no_form_of_operand_leaves_the_window() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (n, (at, form)) in [LOW, PIE].into_iter().flat_map(|at| FORMS.map(|form| (at, form))).enumerate() {
        // The form, three times with other registers, so that what is known of them is used.
        let mut program = Vec::new();
        program.extend(form);
        program.extend([0x48, 0x83, 0xC3, 0x10]); // add rbx, 16
        program.extend(form);
        program.extend([0xF3, 0x90, 0xEB, 0xFC]); // for ever: pause
        // (The first that has the lowest arena has it near, the other one far.)
        let others = [(EngineKind::Dbt, Windows::Always); 2];
        let kinds = [(EngineKind::Reference, Windows::Never), others[0], others[1]];
        let mut all = kinds.map(|(kind, windows)| machine(kind, windows, at, &program));
        for base in edges() {
            for index in [0, 8, 0x7FFF_FFFF, 0xFFFF_FFFF, u64::MAX, 1 << 40] {
                let outcomes = all.each_mut().map(|p| {
                    let c = &mut *p.core;
                    (c.cpl, c.rip, c.gpr[3], c.gpr[1]) = (3, at, base, index);
                    (c.gpr[0], c.gpr[4], c.gpr[5]) = (0x1122_3344, STACK + 0x8000, 0);
                    c.seg[seg::SS].attr = 0xC0F3;
                    c.seg[seg::CS].attr = 0xA0FB;
                    c.activity = silicon::cpu::state::Activity::Active;
                    c.refresh();
                    p.run(12, &mut || false);
                    (p.core.rip, p.core.cr2, p.core.gpr, p.core.fx.0)
                });
                for outcome in &outcomes[1..] {
                    assert_eq!(&outcomes[0], outcome, "form {n} base {base:#x} index {index:#x}");
                }
            }
        }
        let memory = all.each_ref().map(memory_of);
        assert_eq!([memory[0]; 2], memory[1..], "form {n}");
        let is_far = |p: &Processor| p.core.tlb.windows.current().map(|window| window.is_far());
        let expected = [Some(false), Some(at == LOW)];
        assert_eq!(expected, [is_far(&all[1]), is_far(&all[2])], "form {n}");
    }
}

/// For ever: counts at RDI, reads that again, and makes a system call.
const CALLER: &[u8] = &[
    0x48, 0xFF, 0x07, // again: inc qword [rdi]
    0x48, 0x03, 0x07, // add rax, [rdi]
    0x50, // push rax
    0x0F, 0x05, // syscall
    0x5A, // pop rdx
    0xEB, 0xF4, // jmp again
];
/// A handler that takes long, so that most runs end in it, and the next ones begin there.
const LONG: &[u8] = &[
    0xBB, 0xE8, 0x03, 0, 0, // mov ebx, 1000
    0xFF, 0xCB, // again: dec ebx
    0x75, 0xFC, // jnz again
    0x48, 0x0F, 0x07, // sysretq
];

/// Two processors with [`CALLER`], each in a memory of its own; what they count differs.
fn callers(engine: EngineKind, windows: Windows) -> [Processor; 2] {
    [1, 1 << 32].map(|first| {
        let mut p = machine(engine, windows, PIE, CALLER);
        p.core.gpr[7] = LIBRARY + 0x10_0000;
        p.core.gpr[0] = first;
        let handler = system_calls(&mut p);
        p.core.mem.write_bytes(handler, LONG);
        p
    })
}

/// Its window was used, and was where its accesses led.
fn has_stayed(p: &Processor) {
    assert!(counter(p, "window_fills") > 0);
    assert_eq!(0, counter(p, "window_strays"));
}

/// A processor that goes on in the kernel comes back to its program's window, whoever ran on the
/// thread since.
#[test]
fn processors_take_turns_on_a_thread() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut expected = callers(EngineKind::Reference, Windows::Never);
    let mut all = callers(EngineKind::Dbt, Windows::Always);
    for turn in 0..100 {
        for (p, expected) in all.iter_mut().zip(&mut expected) {
            run(p, 5003);
            run(expected, 5003);
            assert_eq!(seen(expected), seen(p), "turn {turn}");
        }
    }
    all.iter().for_each(has_stayed);
}

/// The same on whatever thread it goes on: no access leads to where another thread's windows are, or to
/// this process's own memory.
#[test]
fn a_processor_goes_on_in_another_thread() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let [mut expected, _] = callers(EngineKind::Reference, Windows::Never);
    let [mut p, _] = callers(EngineKind::Dbt, Windows::Always);
    for turn in 0..10 {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| run(&mut p, 5003));
            there.join().unwrap();
        });
        run(&mut p, 5003);
        run(&mut expected, 10_006);
        assert_eq!(seen(&mut expected), seen(&mut p), "turn {turn}");
    }
    has_stayed(&p);
}

/// Bytes for each instruction, block heads and ends in the sum.
#[test]
fn an_instruction_becomes_fewer_bytes() {
    // again: mov rax,[rbx+8]; add rax,[rbx+16]; mov [rbx+24],rax; mov rax,[rsp+8]; mov [rsp+16],rax; jmp
    let program = [
        0x48, 0x8B, 0x43, 0x08, 0x48, 0x03, 0x43, 0x10, 0x48, 0x89, 0x43, 0x18, 0x48, 0x8B, 0x44, 0x24, 0x08,
        0x48, 0x89, 0x44, 0x24, 0x10, 0xEB, 0xE8,
    ];
    let bytes = [Windows::Never, Windows::Always].map(|windows| {
        let mut p = machine(EngineKind::Dbt, windows, PIE, &program);
        p.core.gpr[3] = LIBRARY + 0x10_0000;
        run(&mut p, 10_000);
        counter(&p, "emitted_bytes") / counter(&p, "translated_instructions")
    });
    assert!(bytes[1] < bytes[0] && bytes[1] <= 45, "{bytes:?}");
}
