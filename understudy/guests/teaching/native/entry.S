/* The way in for 48 exceptions and interrupts and for INT 80h, and the way out. */
#include "../common/registers.S"
        .text
        .set vector, 0
        .rept 48
        .balign 16
        .if vector == 0
        .global stubs
stubs:
        .endif
        .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17
        push $0                         /* where others have an error code */
        .endif
        push $vector
        jmp common
        .set vector, vector + 1
        .endr
        .balign 16
        .global system_call_stub
system_call_stub:
        push $0
        push $0x80
common:
        save
        call_on_event
        .global back_to_user
back_to_user:
        restore_all_but_ax
        pop AX
        add $2 * WORD, SP
#ifdef __x86_64__
        iretq
#else
        iretl
#endif
        .section .note.GNU-stack,"",@progbits
