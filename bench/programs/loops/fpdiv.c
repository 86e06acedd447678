/* A chain of double-precision divisions and square roots. */
#include "bench.h"

uint64_t bench(uint64_t size) {
    double x = 3.0;
    for (uint64_t i = 0; i < size * 1000; i++) {
        x = 7.25 / x + 0.125;
        if (x > 4.0) x = __builtin_sqrt(x) / 1.5;
    }
    return fold_double(0, x);
}
