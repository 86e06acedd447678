/* One random cycle through 1 MB of pointers: nothing but load latency. */
#include "bench.h"

enum { CELLS = 131072 };
static void *cells[CELLS];

void prepare(void) {
    static uint32_t order[CELLS];
    uint64_t state = 42;
    for (uint32_t i = 0; i < CELLS; i++) order[i] = i;
    for (uint32_t i = CELLS - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(next_random(&state) % (i + 1)), keep = order[i];
        order[i] = order[j];
        order[j] = keep;
    }
    for (uint32_t i = 0; i < CELLS; i++) cells[order[i]] = &cells[order[(i + 1) % CELLS]];
}

uint64_t bench(uint64_t size) {
    void **at = cells;
    for (uint64_t step = 0; step < size * 10007; step++) at = (void **)*at;
    return (uint64_t)(at - cells);
}
