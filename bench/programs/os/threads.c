/* Two threads of one process hand each other the turn through a futex. */
#include "os.h"
#include <linux/futex.h>

static uint32_t turn;
static char stack[64 << 10] __attribute__((aligned(16)));

static void wait_for(uint32_t mine) {
    for (uint32_t now; (now = __atomic_load_n(&turn, __ATOMIC_ACQUIRE)) % 2 != mine;)
        syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, now, NULL, NULL, 0);
}

static void hand_over(void) {
    __atomic_fetch_add(&turn, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static int other(void *rounds) {
    for (uint64_t i = 0; i < *(uint64_t *)rounds; i++) {
        wait_for(1);
        hand_over();
    }
    return 0;
}

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    pid_t child = clone(other, stack + sizeof stack,
                        CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | SIGCHLD, &size);
    if (child < 0) give_up("clone");
    for (uint64_t i = 0; i < size; i++) {
        hand_over();
        wait_for(0);
    }
    reap(child);
    return turn;
}
