/* Where a paravirtual kernel begins: its page tables and segments are there, SI says the rest. */
        .section .boot, "ax"
        .global start
start:
#ifdef __x86_64__
        mov $boot_stack, %rsp
        mov %rsi, %rdi
        call machine_start
#else
        mov $boot_stack, %esp
        push %esi
        call machine_start
#endif
        .bss
        .balign 16
        .skip 8192
boot_stack:
        .section .note.understudy, "a"
        .balign 4
        .long 11, 4, 1                  /* bytes of the name, of what follows; kind: paravirtual */
        .asciz "understudy"
        .balign 4
        .long 1                         /* version of the interface */
        .section .note.GNU-stack,"",@progbits
