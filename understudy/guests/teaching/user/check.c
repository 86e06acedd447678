/* The self-check: what processes have from the kernel, a line for each. */
#include "user.h"

#define HEAP ((volatile u8 *)0x800000)
#define KERNEL ((volatile u8 *)~0xFFFul)

static int failed;
static volatile int shared = 1; /* by parent and child, until one writes */

static void result(const char *name, int is_right)
{
    say(is_right ? "ok      " : "failed  ");
    say(name);
    say("\n");
    failed += !is_right;
}

static unsigned long long now(void)
{
    unsigned long long ns = 0;
    call(C_TIME, (word)&ns, 0);
    return ns;
}

/* --- what children do --- */

static void with_7(void) { leave(7); }

static void write_shared(void)
{
    shared = 2;
    leave(shared == 2 ? 3 : 4);
}

static void read_kernel(void) { (void)*KERNEL; }
static void write_nowhere(void) { *(volatile u8 *)0x10 = 1; }
static void divide(void) { __asm__ volatile("xor %%edx,%%edx; xor %%ecx,%%ecx; div %%ecx" : : : "eax", "ecx", "edx"); }
static void privileged(void) { __asm__ volatile("hlt"); }
static void undefined(void) { __asm__ volatile("ud2"); }
static void spin(void)
{
    for (;;)
        ;
}

static word tls_word(void)
{
    word value;
#ifdef __x86_64__
    __asm__ volatile("mov %%fs:0, %0" : "=r"(value));
#else
    __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
#endif
    return value;
}

static void own_tls(void)
{
    word block = (word)call(C_ID, 0, 0);
    call(C_TLS, (word)&block, 0);
    for (int n = 0; n < 10; n++) {
        yield();
        if (tls_word() != block)
            leave(1);
    }
}

static u32 xmm(int is_load, u32 value)
{
    if (is_load)
        __asm__ volatile("movd %0, %%xmm3" : : "r"(value));
    else
        __asm__ volatile("movd %%xmm3, %0" : "=r"(value));
    return value;
}

static void own_fpu(void)
{
    u32 mine = 1000 + (u32)call(C_ID, 0, 0);
    xmm(1, mine);
    for (int n = 0; n < 10; n++) {
        yield();
        if (xmm(0, 0) != mine)
            leave(1);
    }
}

static void watched(void)
{
    call(C_WATCH, (word)&shared, 0);
    for (int n = 0; n < 3; n++) {
        shared = n;
        yield();
    }
    leave((int)call(C_WATCH, 0, 0));
}

static void write_much(void)
{
    for (word n = 0; n < 600; n++)
        HEAP[n * 4096] = (u8)n;
    for (word n = 0; n < 600; n++)
        if (HEAP[n * 4096] != (u8)n || HEAP[n * 4096 + 1])
            leave(1);
}

/* --- the checks --- */

/* Whether so many children at once all end with 0. */
static int together(int children, void (*work)(void))
{
    int right = 1, status, started = 0;
    for (int n = 0; n < children; n++) {
        int id = fork();
        if (!id) {
            work();
            leave(0);
        }
        started += id > 0;
    }
    for (int n = 0; n < started; n++)
        right &= wait_for(&status) > 0 && !status;
    return right && started == children;
}

static int preempts(void)
{
    unsigned long long start = now();
    int id = fork();
    if (!id)
        spin(); /* for ever: only a timer gets the processor back */
    sleep_ms(50);
    return now() - start >= 50000000ull;
}

static int is_full_once(void)
{
    int ids = 0, status;
    while (ids < 100) {
        int id = fork();
        if (!id) {
            sleep_ms(20);
            leave(0);
        }
        if (id < 0)
            break;
        ids++;
    }
    for (int n = 0; n < ids; n++)
        if (wait_for(&status) < 0)
            return 0;
    return ids > 3 && ids < 100;
}

static int is_ordered(void)
{
    unsigned long long a = now(), b;
    for (int n = 0; n < 50; n++) {
        b = now();
        if (b < a)
            return 0;
        a = b;
    }
    return 1;
}

int self_check(void)
{
    int status = -1;
    failed = 0;
    word free_before;
    result("fork, exit, wait", child(with_7) == 7);
    (void)HEAP[0];
    free_before = call(C_FREE, 0, 0);
    result("wait without a child", wait_for(&status) == -1);
    shared = 1;
    result("copy on write", child(write_shared) == 3 && shared == 1);
    result("demand-zero pages", child(write_much) == 0 && !HEAP[0]);
    result("a program does not read the kernel", child(read_kernel) == 128 + 14);
    result("nor write where nothing is", child(write_nowhere) == 128 + 14);
    result("a division by 0 ends it", child(divide) == 128 + 0);
    result("a privileged instruction ends it", child(privileged) == 128 + 13);
    result("an undefined instruction ends it", child(undefined) == 128 + 6);
    result("a bad pointer is refused", call(C_WRITE, (word)KERNEL, 4) == (word)-1 &&
                                           call(C_TIME, 8, 0) == (word)-1);
    result("time does not go back", is_ordered());
    result("TLS of each process", together(3, own_tls));
    result("FPU of each process", together(3, own_fpu));
    result("debug registers of each process", child(watched) == 3);
    result("as many processes as there are", is_full_once());
    result("no frame is lost", call(C_FREE, 0, 0) == free_before);
    result("preemption", preempts());
    say(failed ? "self-check: failed " : "self-check: ok, failed ");
    say_number(failed);
    say("\n");
    return failed;
}
