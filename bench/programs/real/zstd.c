/* Zstandard at levels 3 and 9: 1 MB of text compressed and expanded again. */
#include "bench.h"
#include <zstd.h>

enum { BYTES = 1 << 20 };
static unsigned char text[BYTES], packed[BYTES + BYTES / 8], again[BYTES];

void prepare(void) { make_text(text, BYTES, 109); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        text[size % BYTES] ^= 1;
        size_t bytes = ZSTD_compress(packed, sizeof packed, text, BYTES, size & 1 ? 9 : 3);
        if (ZSTD_isError(bytes)) give_up("zstd: compress");
        size_t back = ZSTD_decompress(again, sizeof again, packed, bytes);
        if (back != BYTES || memcmp(text, again, BYTES) != 0) give_up("zstd: round trip");
        sum = fold(sum, packed, bytes);
    }
    return sum;
}
