/* Random updates all over 32 MB: every access misses every small TLB. */
#include "bench.h"

enum { WORDS = 4 << 20 };
static uint64_t *words;

void prepare(void) {
    words = malloc(WORDS * sizeof *words);
    for (size_t i = 0; i < WORDS; i++) words[i] = i;
}

uint64_t bench(uint64_t size) {
    uint64_t state = 33, sum = 0;
    for (uint64_t i = 0; i < size * 1000; i++) {
        uint64_t r = next_random(&state);
        sum += words[r % WORDS] += r;
    }
    return sum;
}
