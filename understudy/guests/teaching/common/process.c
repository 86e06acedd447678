/* Processes: fork, wait, exit, sleep, and whose turn it is. */
#include "machine.h"

struct process processes[PROCESSES], *current = &processes[0];
static struct process *fpu_owner; /* whose state the FPU has */
static u8 fresh_fpu[512] __attribute__((aligned(16)));
u32 ticks;

static word stack_top(struct process *p) { return (word)p->kernel_stack + sizeof p->kernel_stack; }

/* What the processor has to have for a process in user mode. */
static void load(struct process *p)
{
    machine_use(p->root);
    machine_stack(stack_top(p));
    machine_tls(p->tls);
    machine_watch(p->watched);
    machine_fpu(fpu_owner == p);
}

/* Somebody else's turn, if anybody is ready.  Interrupts are off. */
static struct process *pick(void)
{
    for (int n = 1; n <= PROCESSES; n++) {
        struct process *p = &processes[(current - processes + n) % PROCESSES];
        if (p->state == READY)
            return p;
    }
    return 0;
}

void schedule(void)
{
    int was_on = irq_save();
    struct process *to, *from = current;
    while (!(to = pick())) {
        machine_wait();
        irq_save();
    }
    if (to != from) {
        current = to;
        load(to);
        switch_stacks(&from->stack, to->stack);
    }
    irq_restore(was_on);
}

/* The current process is in this state until somebody wakes it. */
static void block(enum state state)
{
    current->state = state;
    schedule();
}

void on_tick(void)
{
    u64 now = machine_time();
    int has_line = line_poll();
    ticks++;
    for (struct process *p = processes; p < processes + PROCESSES; p++)
        if ((p->state == SLEEPING && p->wakes <= now) || (p->state == READING && has_line))
            p->state = READY;
    machine_tick();
}

void process_sleep(u64 ns)
{
    int was_on = irq_save();
    current->wakes = machine_time() + ns;
    block(SLEEPING);
    irq_restore(was_on);
}

static struct process *claim(void)
{
    int was_on = irq_save();
    struct process *found = 0;
    for (struct process *p = processes; p < processes + PROCESSES && !found; p++)
        if (p->state == FREE) {
            p->state = WAITING; /* nobody wakes it yet */
            found = p;
        }
    irq_restore(was_on);
    return found;
}

/* A new process begins by leaving the kernel with this frame. */
static void begin(struct process *p, struct frame *frame)
{
    static int last;
    struct frame *copy = (struct frame *)stack_top(p) - 1;
    word *stack = (word *)copy;
    *copy = *frame;
    *--stack = (word)back_to_user;
    for (int n = 0; n < 6; n++) /* as many registers as switch_stacks loads */
        *--stack = 0;
    p->stack = (word)stack;
    p->id = ++last;
    p->has_fpu = p->hits = 0;
    p->state = READY;
}

int process_fork(struct frame *frame)
{
    struct process *child = claim();
    if (!child)
        return -1;
    child->root = space_new();
    if (!child->root || !space_copy(current->root, child->root)) {
        if (child->root)
            space_end(child->root);
        child->state = FREE;
        return -1;
    }
    child->parent = current->id;
    child->tls = current->tls;
    child->watched = 0;
    begin(child, frame);
    ((struct frame *)stack_top(child) - 1)->ax = 0;
    return child->id;
}

int process_wait(int *status)
{
    for (;;) {
        int children = 0, was_on = irq_save();
        for (struct process *p = processes; p < processes + PROCESSES; p++) {
            if (p->state == FREE || p->parent != current->id)
                continue;
            children++;
            if (p->state == ZOMBIE) {
                irq_restore(was_on);
                *status = p->status;
                space_end(p->root);
                p->state = FREE;
                return p->id;
            }
        }
        if (!children) {
            irq_restore(was_on);
            return -1;
        }
        block(WAITING);
        irq_restore(was_on);
    }
}

void process_exit(int status)
{
    irq_save();
    if (current->id == 1) {
        print("the first process has ended: %d\n", status);
        machine_off();
    }
    for (struct process *p = processes; p < processes + PROCESSES; p++) {
        if (p->state != FREE && p->parent == current->id)
            p->parent = 1;
        if (p->state == WAITING && (p->id == current->parent || p->id == 1))
            p->state = READY;
    }
    if (fpu_owner == current)
        fpu_owner = 0;
    current->status = status;
    block(ZOMBIE);
    panic("a process that has ended goes on");
}

/* The FPU is used by a process that has not got it. */
void use_fpu(void)
{
    int was_on = irq_save();
    machine_fpu(1);
    if (fpu_owner)
        __asm__ volatile("fxsave %0" : "=m"(fpu_owner->fpu));
    if (!current->has_fpu)
        memcpy(current->fpu, fresh_fpu, sizeof fresh_fpu);
    __asm__ volatile("fxrstor %0" : : "m"(current->fpu));
    current->has_fpu = 1;
    fpu_owner = current;
    irq_restore(was_on);
}

/* The first process: the program that lies in the kernel's image. */
void processes_start(void)
{
    extern char user_image[], user_end[], user_start[];
    struct process *p = claim();
    struct frame frame = {0};
    __asm__ volatile("fninit; fxsave %0" : "=m"(fresh_fpu));
    *(u32 *)(fresh_fpu + 24) = 0x1F80; /* MXCSR as it is after power-on */
    p->root = space_new();
    for (word at = USER; at < (word)user_end; at += PAGE) {
        word gpa = frame_new();
        memcpy(BY(gpa), user_image + (at - USER), PAGE);
        *entry_at(p->root, at, BUILD) = entry_of(gpa, P | RW | US);
    }
    space_ready(p->root);
    frame.ip = (word)user_start;
    frame.cs = USER_CS;
    frame.flags = 0x202;
    frame.sp = STACK_END - 16;
    frame.ss = USER_DS;
    begin(p, &frame);
    current = p;
    load(p);
    word nobody;
    switch_stacks(&nobody, p->stack);
}
