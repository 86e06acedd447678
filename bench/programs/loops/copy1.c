/* Copies 64 KB one byte at a time. */
#include "bench.h"

enum { BYTES = 65536 };
static unsigned char source[BYTES], target[BYTES];

void prepare(void) { make_text(source, sizeof source, 19); }

static __attribute__((noinline)) void copy(unsigned char *to, const unsigned char *from) {
    for (int i = 0; i < BYTES; i++) to[i] = from[i];
    __asm__ volatile("" ::: "memory");
}

uint64_t bench(uint64_t size) {
    while (size--) {
        source[size % BYTES]++;
        copy(target, source);
    }
    return fold(0, target, sizeof target);
}
