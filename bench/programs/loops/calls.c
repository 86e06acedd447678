/* Small functions called directly and through pointers. */
#include "bench.h"

typedef uint64_t (*step)(uint64_t);
static __attribute__((noipa)) uint64_t add(uint64_t x) { return x + 0x1234567; }
static __attribute__((noipa)) uint64_t spread(uint64_t x) { return x * 2862933555777941757u; }
static __attribute__((noipa)) uint64_t mix(uint64_t x) { return x ^ x >> 31; }
static __attribute__((noipa)) uint64_t turn(uint64_t x) { return x << 7 | x >> 57; }

static step steps[4] = {add, spread, mix, turn};

uint64_t bench(uint64_t size) {
    uint64_t x = 1;
    for (uint64_t i = 0; i < size * 1000; i++) x = mix(add(steps[i & 3](x)));
    return x;
}
