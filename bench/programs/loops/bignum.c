/* Adds numbers of 4,096 bits: the carry flag stays alive through a whole loop. */
#include "bench.h"

enum { LIMBS = 64 };
static uint64_t a[LIMBS], b[LIMBS];

static void add(uint64_t *to, const uint64_t *from) {
    uint64_t count = LIMBS, limb;
    __asm__ volatile("clc\n"
                     "1: mov (%[from]), %[limb]\n"
                     "   adc %[limb], (%[to])\n"
                     "   lea 8(%[from]), %[from]\n"
                     "   lea 8(%[to]), %[to]\n"
                     "   dec %[count]\n"
                     "   jnz 1b\n"
                     : [from] "+r"(from), [to] "+r"(to), [count] "+r"(count), [limb] "=&r"(limb)
                     :
                     : "cc", "memory");
}

uint64_t bench(uint64_t size) {
    uint64_t state = 21;
    for (int i = 0; i < LIMBS; i++) {
        a[i] = next_random(&state);
        b[i] = next_random(&state);
    }
    for (uint64_t i = 0; i < size * 1000; i++) {
        add(a, b);
        add(b, a);
    }
    return fold(0, a, sizeof a);
}
