/* xz at preset 3: 512 KB of text compressed and expanded again. */
#include "bench.h"
#include <lzma.h>

enum { BYTES = 512 << 10 };
static unsigned char text[BYTES], packed[2 * BYTES], again[BYTES];

void prepare(void) { make_text(text, BYTES, 107); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        size_t bytes = 0, at = 0, back = 0;
        uint64_t limit = UINT64_MAX;
        text[size % BYTES] ^= 1;
        if (lzma_easy_buffer_encode(3, LZMA_CHECK_CRC64, NULL, text, BYTES, packed, &bytes,
                                    sizeof packed))
            give_up("xz: encode");
        if (lzma_stream_buffer_decode(&limit, 0, NULL, packed, &at, bytes, again, &back, BYTES))
            give_up("xz: decode");
        if (back != BYTES || memcmp(text, again, BYTES) != 0) give_up("xz: round trip");
        sum = fold(sum, packed, bytes);
    }
    return sum;
}
