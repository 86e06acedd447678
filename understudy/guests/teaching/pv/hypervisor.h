/* What the kernel and its hypervisor have agreed on: understudy/execution/pv/interface.py in C.
 *
 * A call is INT 82h: number in AX, arguments in BX, CX, DX, the result in AX (and DX).
 */
#ifndef HYPERVISOR_H
#define HYPERVISOR_H

#define START 0
#define RETURN 1
#define UPDATE 2
#define FRAMES 3
#define SET_IF 4
#define LOOK 5
#define SET_STACK 6
#define SET_TLS 7
#define SET_FPU 8
#define SET_WATCH 9
#define TIME 10
#define TIMER_IN 11
#define WRITE 12
#define READ 13
#define WAIT 14
#define OFF 15

#define MOST_UPDATES 2048
#define MOST_FRAMES 4096
#define MOST_TEXT 4096

#ifndef __ASSEMBLER__
#include "../common/kernel.h"

/* What a change of page tables is, in the low bits of `where`. */
enum change { ENTRY, INVALIDATE, PIN, UNPIN, LOAD };
struct update { u64 where, value; };

enum feature { VIRTUAL_IF = 1 };
enum changed { STACK_CHANGED = 1, TLS_CHANGED = 2, FPU_CHANGED = 4, WATCH_CHANGED = 8 };

/* The page that both write. */
struct shared {
    u32 if_on, pending;
    u64 fault, tsc_offset;
    u32 changed, fpu_off;
    u64 stack, tls, watch, watching, debug, queue, queued;
};

/* What SI points to at the start: guests/pv.py makes it. */
struct start_info {
    u64 memory_end; /* of what is mapped, from BASE on */
    u64 first_free;
    u64 root;       /* gpa of the first page tables' root */
    u64 direct;     /* and of its tables of the last level, one behind the other */
    u64 shared;     /* gpa of a page for it */
    char command_line[];
};

static inline word hypercall(word number, word a, word b, word c)
{
    word result = number;
    __asm__ volatile("int $0x82" : "+a"(result), "+d"(c) : "b"(a), "c"(b) : "memory");
    return result;
}
#endif
#endif
