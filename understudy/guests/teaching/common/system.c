/* Events and system calls, and where the kernel begins. */
#include "machine.h"

const char *command_line;

static int same(const char *a, const char *b)
{
    while (*b && *a == *b)
        a++, b++;
    return !*b && (!*a || *a == ' ');
}

int option(const char *name)
{
    for (const char *at = command_line; *at; at++)
        if ((at == command_line || at[-1] == ' ') && same(at, name))
            return 1;
    return 0;
}

/* --- memory of a process --- */

/* Where the kernel finds it, up to the end of its page; 0: the process has none there. */
static char *reach(word at, int is_write)
{
    if (!page_in(at, is_write))
        return 0;
    machine_commit();
    return (char *)BY(gpa_of(*entry_at(current->root, at, NOT))) + at % PAGE;
}

static int copy_out(word to, const void *from, word bytes)
{
    for (word n = 0; n < bytes; n++) {
        char *at = reach(to + n, 1);
        if (!at)
            return 0;
        *at = ((const char *)from)[n];
    }
    return 1;
}

static word write_out(word from, word bytes)
{
    for (word done = 0; done < bytes;) {
        char *at = reach(from + done, 0);
        word part = PAGE - (from + done) % PAGE;
        if (!at)
            return -1;
        if (part > bytes - done)
            part = bytes - done;
        machine_write(at, part);
        done += part;
    }
    return bytes;
}

static word read_in(word to, word most)
{
    char text[128];
    int was_on = irq_save();
    while (!line_poll()) {
        current->state = READING;
        schedule();
    }
    irq_restore(was_on);
    word n = line_read(text, most < sizeof text ? most : sizeof text);
    return copy_out(to, text, n) ? n : (word)-1;
}

static word has_option(word at)
{
    char name[16];
    for (word n = 0; n < sizeof name; n++) {
        char *byte = reach(at + n, 0);
        if (!byte)
            return -1;
        if (!(name[n] = *byte))
            return option(name);
    }
    return 0;
}

/* --- the kernel's own operations, many times over, to be counted from outside --- */

static word recover; /* where the next fault of the kernel's own leads: it is made on purpose */

#define FAULTS(instruction, operand) \
    __asm__ volatile("mov%z0 $1f, %0\n" instruction "\n1:" \
                     : "=m"(recover) : "c"(operand) : "ax", "dx", "memory")

static word bench(enum bench what, word times)
{
    word gpa = GPA(&processes[0]) & -PAGE;
    u64 *entry;
    switch (what) {
    case B_IRQ:
        for (word n = 0; n < times; n++)
            irq_restore(irq_save());
        break;
    case B_STATE:
        for (word n = 0; n < times; n++) {
            machine_tls(current->tls);
            machine_watch(current->watched);
            machine_fpu(0);
            machine_fpu(1);
        }
        break;
    case B_MAP:
        for (word n = 0; n < times; n++) { /* tables first, for they are made at once */
            if (HEAP + n * PAGE >= HEAP_END || !entry_at(current->root, HEAP + n * PAGE, LIVE))
                return -1;
        }
        for (word n = 0; n < times; n++)
            entry_write(entry_at(current->root, HEAP + n * PAGE, NOT), entry_of(gpa, P));
        machine_commit();
        for (word n = 0; n < times; n++)
            entry_write(entry_at(current->root, HEAP + n * PAGE, NOT), 0);
        machine_commit();
        break;
    case B_SWITCH:
        for (word n = 0; n < times; n++)
            machine_use(current->root), machine_commit();
        break;
    case B_PORT:
        for (word n = 0; n < times; n++)
            machine_port();
        break;
    case B_PRIORITY:
        for (word n = 0; n < times; n++)
            machine_priority(0);
        break;
    case B_CALL:
        for (word n = 0; n < times; n++)
            __asm__ volatile("call 1f\njmp 2f\n1: ret\n2:" : : : "memory");
        break;
    case B_DIVIDE:
        for (word n = 0; n < times; n++)
            FAULTS("div %%ecx", 0);
        break;
    case B_FAULT:
        for (word n = 0; n < times; n++)
            FAULTS("mov (%1), %%eax", HEAP_END); /* nobody has anything there */
        break;
    case B_ENTRY:
        if (!page_in(HEAP, 1) || !(entry = entry_at(current->root, HEAP + PAGE, LIVE)))
            return -1;
        machine_use(current->root); /* whatever was not in step with this table is now */
        machine_commit();
        *(volatile u8 *)HEAP; /* a processor walks it */
        for (word n = 0; n < times; n++)
            entry_write(entry, n + 1 < times ? entry_of(gpa, P) : 0);
        machine_commit();
        break;
    case B_TIME:
        for (word n = 0; n < times; n++)
            machine_time();
        break;
    }
    return times;
}

word system_call(struct frame *frame)
{
    word a = frame->bx, b = frame->cx;
    u64 now;
    int status = 0, id;
    switch ((enum call)frame->ax) {
    case C_EXIT:
        process_exit((int)a & 0xFF);
    case C_FORK:
        return process_fork(frame);
    case C_WAIT:
        id = process_wait(&status);
        return id < 0 || !a || copy_out(a, &status, sizeof status) ? id : -1;
    case C_WRITE:
        return write_out(a, b);
    case C_READ:
        return read_in(a, b);
    case C_SLEEP:
        process_sleep((u64)a * 1000000);
        return 0;
    case C_TIME:
        now = machine_time();
        return copy_out(a, &now, sizeof now) ? 0 : -1;
    case C_ID:
        return current->id;
    case C_TLS:
        current->tls = a;
        machine_tls(a);
        return 0;
    case C_WATCH:
        current->watched = a;
        machine_watch(a);
        id = current->hits;
        current->hits = 0;
        return id;
    case C_YIELD:
        schedule();
        return 0;
    case C_FREE:
        return frames_free();
    case C_OPTION:
        return has_option(a);
    case C_OFF:
        machine_off();
    case C_BENCH:
        return bench(a, b);
    }
    return -1;
}

static void kill(struct frame *frame)
{
    if (!(frame->cs & 3)) {
        print("event %d error %x at %x, address %x\n", frame->vector, frame->error, frame->ip,
              fault_address());
        panic("an event of the kernel's own");
    }
    process_exit(128 + (int)frame->vector);
}

/* Everything that interrupts: called with interrupts off. */
void on_event(struct frame *frame)
{
    if (recover && !(frame->cs & 3) && (frame->vector == DIVIDE || frame->vector == PAGE_FAULT)) {
        frame->ip = recover;
        recover = 0;
        return;
    }
    word at = fault_address();
    switch (frame->vector) {
    case TIMER:
        on_tick();
        if (frame->cs & 3)
            schedule();
        return;
    case SYSTEM_CALL:
        irq_restore(1);
        frame->ax = system_call(frame);
        irq_save();
        return;
    case NO_FPU:
        use_fpu();
        return;
    case DEBUG:
        if (!machine_watched())
            kill(frame);
        current->hits++;
        return;
    case PAGE_FAULT:
        if (!(frame->cs & 3) || !page_in(at, frame->error & 2))
            kill(frame);
        return;
    default:
        kill(frame);
    }
}

void kernel_main(word first, word end, const char *line)
{
    command_line = line;
    memory_start(first, end);
    print("teaching kernel, %d bits, %d frames free\n", (word)sizeof(word) * 8,
          (word)frames_free());
    machine_tick();
    processes_start();
    panic("nobody is left");
}
