/* The C library's qsort over 20,000 integers, with a comparison called back. */
#include "bench.h"

enum { COUNT = 20000 };
static uint32_t numbers[COUNT];

static int compare(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0, state = 3;
    while (size--) {
        for (int i = 0; i < COUNT; i++) numbers[i] = (uint32_t)next_random(&state);
        qsort(numbers, COUNT, sizeof numbers[0], compare);
        sum = fold_word(sum, numbers[COUNT / 3]);
    }
    return sum;
}
