/* FNV-1a over 64 KB, one byte a step. */
#include "bench.h"

static unsigned char data[65536];

void prepare(void) { make_text(data, sizeof data, 11); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0xCBF29CE484222325u;
    while (size--)
        for (size_t i = 0; i < sizeof data; i++) sum = (sum ^ data[i]) * 0x100000001B3u;
    return sum;
}
