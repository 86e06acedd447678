/* The way in for all events: the hypervisor has pushed which it is; and the way out. */
#include "../common/registers.S"
#include "hypervisor.h"
        .text
        .global event_entry
event_entry:
        save
        call_on_event
        .global back_to_user
back_to_user:
        restore_all_but_ax
        mov $RETURN, %eax               /* AX itself is the first word of the frame */
        int $0x82
        ud2                             /* the hypervisor refuses what goes with it */
        .section .note.GNU-stack,"",@progbits
