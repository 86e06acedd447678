/* The teaching kernel: what its parts know of each other.
 *
 * A small Unix: processes with page tables of their own, fork with copy-on-write, wait, exit,
 * system calls, preemption by a timer, demand-zero pages, and FPU, TLS and debug registers for
 * each process.  One processor.  The same source runs on 32 bits (PAE) and on 64, on a processor
 * (native/) and on a hypervisor that it knows of (pv/): machine.h is the line between.
 *
 * Interrupts are off in the kernel where it says so (irq_save), else on.  A process is preempted
 * only on the way back to user mode.
 */
#ifndef KERNEL_H
#define KERNEL_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word; /* a register */

#define PAGE 4096ul
#define ENTRIES 512
#ifdef __x86_64__
#define BASE 0xFFFFFFFF80000000ul /* physical address 0, as the kernel sees it */
#define LEVELS 4
#define KERNEL_SLOT 511 /* of a root: the kernel's half, the same in all */
#else
#define BASE 0xC0000000ul
#define LEVELS 3
#define KERNEL_SLOT 3
#endif
#define RAM_MOST (32ul << 20) /* more is not used */
#define FRAMES_MOST (RAM_MOST / PAGE)

/* An entry of a page table (SDM 3A, "4-Level Paging and 5-Level Paging"). */
#define P 1ull
#define RW 2ull
#define US 4ull
#define COW 0x200ull /* for software: writable once it is copied */
#define LINK (LEVELS == 3 ? P : P | RW | US) /* of a root, to a table: PAE has no rights there */

/* Addresses of a process. */
#define USER 0x400000ul
#define HEAP 0x800000ul
#define HEAP_END 0x1800000ul
#define STACK 0x1FF0000ul
#define STACK_END 0x2000000ul

#define KERNEL_CS 0x08
#define USER_CS 0x1B
#define USER_DS 0x23

#include "calls.h"

/* What an event leaves on the kernel's stack: registers, then what the processor pushes. */
struct frame {
#ifdef __x86_64__
    word r15, r14, r13, r12, r11, r10, r9, r8;
#endif
    word bp, di, si, dx, cx, bx, ax;
    word vector, error, ip, cs, flags, sp, ss; /* sp, ss: of user mode only */
};

enum vector { DIVIDE = 0, DEBUG = 1, NO_FPU = 7, PAGE_FAULT = 14, TIMER = 0x20, SYSTEM_CALL = 0x80 };

enum state { FREE, READY, SLEEPING, WAITING, READING, ZOMBIE };

struct process {
    word stack;             /* where the kernel left it */
    word root;              /* physical address of its page tables */
    enum state state;
    int id, parent, status;
    u64 wakes;              /* ns, if it sleeps */
    word tls, watched;      /* its thread pointer; an address whose writes are counted */
    u32 hits, has_fpu;
    u8 fpu[512] __attribute__((aligned(16)));
    u8 kernel_stack[2 * PAGE] __attribute__((aligned(16)));
};

#define PROCESSES 24
extern struct process processes[PROCESSES], *current;
extern u32 ticks;

#define BY(gpa) ((void *)((word)(gpa) + BASE))
#define GPA(pointer) ((word)(pointer) - BASE)

/* memory.c */
void memory_start(word first, word end);
word frame_new(void);               /* physical address; 0: there is none */
void frame_release(word gpa);
word space_new(void);
void space_ready(word root);
int space_copy(word from, word to); /* copy-on-write, and ready; 0: no memory for all of it */
void space_end(word root);
enum make { NOT, BUILD, LIVE };     /* tables that are not there: of a space that is not ready, or is */
u64 *entry_at(word root, word at, enum make make);
int page_in(word at, int is_write); /* of the current process; 0: it may not */
u32 frames_free(void);

/* process.c */
void processes_start(void);
void schedule(void);
int process_fork(struct frame *frame);
int process_wait(int *status);
void process_exit(int status) __attribute__((noreturn));
void process_sleep(u64 ns);
void on_tick(void);
void use_fpu(void);
void switch_stacks(word *save, word load); /* switch.S */
void back_to_user(void);                   /* entry.S of native/ or pv/ */

/* system.c */
word system_call(struct frame *frame);
void on_event(struct frame *frame); /* called by entry.S */
void kernel_main(word first, word end, const char *line);
int option(const char *word); /* whether the command line has it */
extern const char *command_line;

/* console.c */
void print(const char *format, ...); /* %s %d %x */
void panic(const char *why) __attribute__((noreturn));
int line_read(char *to, int most);
int line_poll(void); /* whether there is a line */
void *memset(void *to, int byte, word bytes);
void *memcpy(void *to, const void *from, word bytes);

#endif
