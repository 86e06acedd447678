/* A greedy LZ77 compressor and its decompressor over 256 KB of text. */
#include "bench.h"

enum { BYTES = 256 << 10, SLOTS = 1 << 14, SHORTEST = 4, LONGEST = 130 };
static unsigned char text[BYTES], packed[2 * BYTES], again[BYTES + LONGEST];
static uint32_t last_seen[SLOTS];

void prepare(void) { make_text(text, BYTES, 23); }

static size_t compress(void) {
    size_t at = 0, out = 0;
    memset(last_seen, 0, sizeof last_seen);
    while (at + LONGEST < BYTES) {
        uint32_t four;
        memcpy(&four, text + at, 4);
        uint32_t *slot = &last_seen[four * 2654435761u >> 18];
        size_t match = *slot, distance = at - match, length = 0;
        *slot = (uint32_t)at;
        if (match && distance < 65536)
            while (length < LONGEST && text[match + length] == text[at + length]) length++;
        if (length < SHORTEST) {
            packed[out++] = 0;
            packed[out++] = text[at++];
        } else {
            packed[out++] = (unsigned char)(length - SHORTEST + 1);
            packed[out++] = (unsigned char)distance;
            packed[out++] = (unsigned char)(distance >> 8);
            at += length;
        }
    }
    return out;
}

static size_t expand(size_t bytes) {
    size_t out = 0;
    for (size_t at = 0; at < bytes;) {
        unsigned length = packed[at++];
        if (length == 0) {
            again[out++] = packed[at++];
            continue;
        }
        size_t distance = packed[at] | (size_t)packed[at + 1] << 8;
        at += 2;
        for (length += SHORTEST - 1; length--; out++) again[out] = again[out - distance];
    }
    return out;
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        size_t bytes = compress(), out = expand(bytes);
        if (memcmp(text, again, out) != 0) give_up("lz: expansion differs from the text");
        sum = fold_word(sum, bytes);
        text[size % 1000] ^= 1;
    }
    return sum;
}
