/* The registers of `struct frame`, onto the stack and back; AX lies on top in between. */
#ifdef __x86_64__
#define AX %rax
#define SP %rsp
#define WORD 8
        .macro save
        push %rax
        push %rbx
        push %rcx
        push %rdx
        push %rsi
        push %rdi
        push %rbp
        push %r8
        push %r9
        push %r10
        push %r11
        push %r12
        push %r13
        push %r14
        push %r15
        .endm
        .macro restore_all_but_ax
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %r11
        pop %r10
        pop %r9
        pop %r8
        pop %rbp
        pop %rdi
        pop %rsi
        pop %rdx
        pop %rcx
        pop %rbx
        .endm
        .macro call_on_event
        mov %rsp, %rdi
        cld
        call on_event
        .endm
#else
#define AX %eax
#define SP %esp
#define WORD 4
        .macro save
        push %eax
        push %ebx
        push %ecx
        push %edx
        push %esi
        push %edi
        push %ebp
        .endm
        .macro restore_all_but_ax
        pop %ebp
        pop %edi
        pop %esi
        pop %edx
        pop %ecx
        pop %ebx
        .endm
        .macro call_on_event
        push %esp
        cld
        call on_event
        add $4, %esp
        .endm
#endif
