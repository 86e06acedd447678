/* The Mandelbrot set and a long series in long double: the x87 unit. */
#include "bench.h"

static void fold_extended(uint64_t *sum, long double value) {
    unsigned char bytes[16] = {0};
    memcpy(bytes, &value, 10);
    *sum = fold(*sum, bytes, 16);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        long double total = 0, scale = 1.5L + (long double)(i % 10) / 100;
        for (int row = 0; row < 32; row++)
            for (int column = 0; column < 32; column++) {
                long double a = scale * (row - 20) / 16, b = scale * (column - 16) / 16, x = 0, y = 0;
                int steps = 0;
                for (; steps < 60 && x * x + y * y < 4; steps++) {
                    long double next = x * x - y * y + a;
                    y = 2 * x * y + b;
                    x = next;
                }
                total += steps + x / 1024;
            }
        for (int n = 1; n < 2000; n++) total += __builtin_sqrtl(1.0L / n) / (n + total);
        fold_extended(&sum, total);
    }
    return sum;
}
