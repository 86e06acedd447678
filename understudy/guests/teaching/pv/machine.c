/* The machine as a hypervisor has it: calls, and a page that both write. */
#include "../common/machine.h"
#include "hypervisor.h"

static struct start_info *info;
static volatile struct shared *shared;
static int has_virtual_if, is_lazy, is_batched, has_clock, has_console;

/* --- host frames: which are behind ours, and back --- */

static u64 frame_of[FRAMES_MOST];
static u32 by_frame[2 * FRAMES_MOST]; /* a hash table of gfn + 1, by host frame */

static u32 place_of(u64 pfn)
{
    u32 at = (u32)pfn * 2654435761u % (2 * FRAMES_MOST);
    while (by_frame[at] && frame_of[by_frame[at] - 1] != pfn)
        at = (at + 1) % (2 * FRAMES_MOST);
    return at;
}

static void learn_frames(u32 count)
{
    for (u32 n = 0; n < count; n += MOST_FRAMES)
        hypercall(FRAMES, (word)&frame_of[n], n, count - n < MOST_FRAMES ? count - n : MOST_FRAMES);
    for (u32 n = 0; n < count; n++)
        by_frame[place_of(frame_of[n])] = n + 1;
}

/* --- page tables --- */

static struct update queue[MOST_UPDATES];

void machine_commit(void)
{
    u32 count = shared->queued;
    shared->queued = 0;
    if (count && hypercall(UPDATE, (word)queue, count, 0) != count)
        panic("the hypervisor refuses a change of page tables");
}

static void change(u64 where, u64 value)
{
    u32 count = shared->queued;
    queue[count].where = where;
    queue[count].value = value;
    shared->queued = count + 1;
    if (!is_batched || count + 1 == MOST_UPDATES)
        machine_commit();
}

static u64 host(word gpa) { return frame_of[gpa / PAGE] << 12 | gpa % PAGE; }

u64 entry_of(word gpa, u64 flags) { return host(gpa) | flags; }

word gpa_of(u64 entry)
{
    return (by_frame[place_of(entry << 12 >> 24)] - 1) * PAGE;
}

void entry_write(u64 *at, u64 value) { change(host(GPA(at)) | ENTRY, value); }
void machine_invalidate(word at) { change(INVALIDATE, at); }

/* The kernel's own mapping of a frame: a page table is only to be read there. */
static void direct(word gpa, u64 flags)
{
    change(host(info->direct + gpa / PAGE * 8) | ENTRY, entry_of(gpa, flags));
}

void machine_table(word gpa) { direct(gpa, P); }
void machine_table_end(word gpa) { direct(gpa, P | RW); }
void machine_root(word gpa) { change(host(gpa) | PIN, 0); }
void machine_root_end(word gpa) { change(host(gpa) | UNPIN, 0); }

void machine_use(word root) { change(host(root) | LOAD, 0); }

word machine_kernel_root(void) { return info->root; }
word fault_address(void) { return shared->fault; }

/* --- interrupts --- */

int irq_save(void)
{
    int was_on;
    if (!has_virtual_if)
        return hypercall(SET_IF, 0, 0, 0);
    was_on = shared->if_on;
    shared->if_on = 0;
    return was_on;
}

void irq_restore(int was_on)
{
    if (!was_on)
        return;
    if (!has_virtual_if) {
        hypercall(SET_IF, 1, 0, 0);
        return;
    }
    shared->if_on = 1;
    __asm__ volatile("" : : : "memory");
    if (shared->pending)
        hypercall(LOOK, 0, 0, 0);
}

void machine_wait(void) { hypercall(WAIT, 0, 0, 0); }

/* --- what a process has of the processor: told at once, or left where it is looked for --- */

void machine_stack(word top)
{
    if (!is_lazy) {
        hypercall(SET_STACK, top, 0, 0);
        return;
    }
    shared->stack = top;
    shared->changed |= STACK_CHANGED;
}

void machine_tls(word base)
{
    if (!is_lazy) {
        hypercall(SET_TLS, base, 0, 0);
        return;
    }
    shared->tls = base;
    shared->changed |= TLS_CHANGED;
}

void machine_watch(word at)
{
    word control = at ? 0xD0001 : 0;
    if (!is_lazy) {
        hypercall(SET_WATCH, at, control, 0);
        return;
    }
    shared->watch = at;
    shared->watching = control;
    shared->changed |= WATCH_CHANGED;
}

word machine_watched(void) { return shared->debug & 1; }

void machine_fpu(int is_on)
{
    if (!is_lazy) {
        hypercall(SET_FPU, !is_on, 0, 0);
        return;
    }
    shared->fpu_off = !is_on;
    shared->changed |= FPU_CHANGED;
}

/* --- the rest of the computer --- */

static u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "d"(port));
    return value;
}

u64 machine_time(void)
{
    u32 low = TIME, high;
    if (has_clock) {
        __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
        return ((u64)high << 32 | low) + shared->tsc_offset;
    }
    __asm__ volatile("int $0x82" : "+a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

void machine_tick(void) { hypercall(TIMER_IN, TICK_NS, 0, 0); }

void machine_write(const char *text, word bytes)
{
    for (word n = 0; n < bytes; n++) {
        if (has_console) {
            word part = bytes - n < MOST_TEXT ? bytes - n : MOST_TEXT;
            hypercall(WRITE, (word)text + n, part, 0);
            n += part - 1;
            continue;
        }
        while (!(inb(0x3FD) & 0x20))
            ;
        __asm__ volatile("outb %0,%1" : : "a"(text[n]), "d"((u16)0x3F8));
    }
}

int machine_read(void)
{
    if (has_console)
        return (int)hypercall(READ, 0, 0, 0);
    return inb(0x3FD) & 1 ? inb(0x3F8) : -1;
}

void machine_off(void)
{
    hypercall(OFF, 0, 0, 0);
    for (;;)
        ;
}

void machine_port(void) { inb(0x80); }
void machine_priority(word level) { (void)level; }

/* --- the beginning --- */

void machine_start(struct start_info *told)
{
    extern void event_entry(void);
    info = told;
    shared = BY(info->shared);
    command_line = info->command_line;
    has_virtual_if = !option("no-if");
    is_lazy = !option("no-lazy");
    is_batched = !option("no-batch");
    has_clock = !option("no-clock");
    has_console = !option("no-console");
    shared->queue = (word)queue;
    hypercall(START, (word)event_entry, info->shared, has_virtual_if ? VIRTUAL_IF : 0);
    learn_frames(info->memory_end / PAGE);
    kernel_main(info->first_free, info->memory_end, info->command_line);
}
