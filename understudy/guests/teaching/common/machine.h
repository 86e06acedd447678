/* The machine, as the kernel asks it: native/ drives a processor, pv/ calls a hypervisor.
 *
 * Everything that a virtual machine must not have from a processor is behind these functions, so
 * that what is common executes no sensitive instruction.
 */
#ifndef MACHINE_H
#define MACHINE_H
#include "kernel.h"

/* Page tables.  What is written to an entry, and which root is in use, counts from machine_commit
 * on, and on the way to user mode; until then the kernel reads what was there before. */
u64 entry_of(word gpa, u64 flags);
word gpa_of(u64 entry);
void entry_write(u64 *at, u64 value);
void machine_invalidate(word at); /* one page of the current process */
void machine_commit(void);
void machine_table(word gpa);     /* this frame becomes a page table: it is complete */
void machine_root(word gpa);      /* and this one the root of an address space */
void machine_root_end(word gpa);  /* it is none any more: all its entries are done with */
void machine_table_end(word gpa); /* nor is this one a table */
void machine_use(word root);      /* translate by it */
word machine_kernel_root(void);

/* Interrupts. */
int irq_save(void); /* off; whether they were on */
void irq_restore(int was_on);
void machine_wait(void); /* until one comes; they are on then */

/* What a process has of the processor; it counts when the kernel goes back to user mode. */
void machine_stack(word top); /* where events from user mode begin */
void machine_tls(word base);
void machine_watch(word at);  /* count writes to 4 bytes here; 0: none */
word machine_watched(void);   /* after a debug event: whether it was that */
void machine_fpu(int is_on);  /* off: its next use is an event */

/* The rest of the computer. */
u64 machine_time(void); /* ns */
void machine_tick(void); /* the timer has interrupted: again in TICK_NS */
#define TICK_NS 10000000ull
void machine_write(const char *text, word bytes);
int machine_read(void); /* a byte of the console, or -1 */
void machine_off(void) __attribute__((noreturn));
word fault_address(void);

/* Single operations, to be counted from outside; a machine without such a thing does nothing. */
void machine_port(void);           /* read port 80h, where a PC has no device to be asked */
void machine_priority(word level); /* which interrupts are held back: CR8, of 64 bits */
#endif
