/* switch_stacks(save, load): keep this stack, and go on where the other one was left. */
        .text
        .global switch_stacks
switch_stacks:
#ifdef __x86_64__
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        mov %rsp, (%rdi)
        mov %rsi, %rsp
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret
#else
        mov 4(%esp), %eax
        mov 8(%esp), %edx
        push %ebx
        push %ebp
        push %esi
        push %edi
        push $0
        push $0
        mov %esp, (%eax)
        mov %edx, %esp
        add $8, %esp
        pop %edi
        pop %esi
        pop %ebp
        pop %ebx
        ret
#endif
        .section .note.GNU-stack,"",@progbits
