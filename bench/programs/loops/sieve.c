/* Sieve of Eratosthenes over 200 KB of bytes: independent stores with a stride. */
#include "bench.h"

enum { LIMIT = 200000 };
static unsigned char composite[LIMIT];

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        memset(composite, 0, sizeof composite);
        for (uint32_t i = 2; i * i < LIMIT; i++)
            if (!composite[i])
                for (uint32_t j = i * i; j < LIMIT; j += i) composite[j] = 1;
        uint64_t primes = 0;
        for (uint32_t i = 2; i < LIMIT; i++) primes += !composite[i];
        sum = fold_word(sum, primes);
    }
    return sum;
}
