/* bzip2 in blocks of 500 KB: 600 KB of text compressed and expanded again. */
#include "bench.h"
#include <bzlib.h>

enum { BYTES = 600000 };
static char text[BYTES], packed[BYTES + BYTES / 50 + 1000], again[BYTES];

void prepare(void) { make_text((unsigned char *)text, BYTES, 103); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        unsigned bytes = sizeof packed, back = sizeof again;
        text[size % BYTES] ^= 1;
        if (BZ2_bzBuffToBuffCompress(packed, &bytes, text, BYTES, 5, 0, 0)) give_up("bzip2: pack");
        if (BZ2_bzBuffToBuffDecompress(again, &back, packed, bytes, 0, 0)) give_up("bzip2: unpack");
        if (back != BYTES || memcmp(text, again, BYTES) != 0) give_up("bzip2: round trip");
        sum = fold(sum, packed, bytes);
    }
    return sum;
}
