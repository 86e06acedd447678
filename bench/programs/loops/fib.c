/* Doubly recursive Fibonacci numbers: calls, returns and pushes. */
#include "bench.h"

static __attribute__((noinline)) uint64_t fib(unsigned n) {
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) sum = fold_word(sum, fib(24 + size % 2));
    return sum;
}
