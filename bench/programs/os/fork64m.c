/* fork with 64 MB touched: page tables copied, eight pages of the child's broken out, wait. */
#include "os.h"

enum { BYTES = 64 << 20, PAGE = 4096 };
static unsigned char *memory;

void prepare(void) {
    stay_on_one_cpu();
    memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) give_up("mmap");
    madvise(memory, BYTES, MADV_NOHUGEPAGE);
    for (size_t at = 0; at < BYTES; at += PAGE) memory[at] = (unsigned char)(at >> 12);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        pid_t child = split();
        if (child == 0) {
            for (size_t page = 0; page < 8; page++) memory[page * 97 * PAGE]++;
            _exit(memory[97 * PAGE] & 63);
        }
        sum = fold_word(sum, reap(child));
    }
    return sum;
}
