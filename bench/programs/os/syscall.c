/* getppid(), the shortest system call that the C library does not cache. */
#include "os.h"

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    long first = syscall(SYS_getppid);
    for (uint64_t i = 0; i < size * 1000; i++) sum += syscall(SYS_getppid) == first;
    return sum;
}
