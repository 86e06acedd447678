/* mmap of 1 MB, one write to each of its 256 pages, munmap. */
#include "os.h"

enum { BYTES = 1 << 20, PAGE = 4096 };

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        unsigned char *memory =
            mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) give_up("mmap");
        madvise(memory, BYTES, MADV_NOHUGEPAGE);
        for (size_t at = 0; at < BYTES; at += PAGE) sum += ++memory[at];
        munmap(memory, BYTES);
    }
    return sum;
}
