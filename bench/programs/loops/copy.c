/* Copies 64 KB in words of eight bytes, four a step: pure load and store throughput. */
#include "bench.h"

enum { WORDS = 8192 };
static uint64_t source[WORDS], target[WORDS];

void prepare(void) { make_text((unsigned char *)source, sizeof source, 17); }

static __attribute__((noinline)) void copy(uint64_t *to, const uint64_t *from) {
    for (int i = 0; i < WORDS; i += 4) {
        uint64_t a = from[i], b = from[i + 1], c = from[i + 2], d = from[i + 3];
        to[i] = a;
        to[i + 1] = b;
        to[i + 2] = c;
        to[i + 3] = d;
    }
    __asm__ volatile("" ::: "memory");
}

uint64_t bench(uint64_t size) {
    while (size--) {
        source[size % WORDS]++;
        copy(target, source);
    }
    return fold(0, target, sizeof target);
}
