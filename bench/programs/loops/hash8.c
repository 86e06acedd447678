/* A multiplicative hash over 64 KB, eight bytes a step: a chain of multiplications. */
#include "bench.h"

static uint64_t data[8192];

void prepare(void) { make_text((unsigned char *)data, sizeof data, 7); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 1;
    while (size--)
        for (int i = 0; i < 8192; i++) {
            sum = (sum ^ data[i]) * 0x9E3779B97F4A7C15u;
            sum ^= sum >> 32;
        }
    return sum;
}
