/* fork, an exit at once in the child, wait. */
#include "os.h"

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        pid_t child = split();
        if (child == 0) _exit((int)(i & 63));
        sum = fold_word(sum, reap(child));
    }
    return sum;
}
