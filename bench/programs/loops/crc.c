/* CRC-32 by a table of 256 entries: a dependent table look-up for each byte. */
#include "bench.h"

static unsigned char data[65536];
static uint32_t table[256];

void prepare(void) {
    make_text(data, sizeof data, 13);
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        table[i] = value;
    }
}

uint64_t bench(uint64_t size) {
    uint32_t sum = 0xFFFFFFFFu;
    while (size--)
        for (size_t i = 0; i < sizeof data; i++) sum = table[(sum ^ data[i]) & 255] ^ sum >> 8;
    return sum;
}
