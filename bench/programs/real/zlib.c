/* zlib at level 6: 1 MB of text deflated and inflated again. */
#include "bench.h"
#include <zlib.h>

enum { BYTES = 1 << 20 };
static unsigned char text[BYTES], packed[BYTES + 4096], again[BYTES];

void prepare(void) { make_text(text, BYTES, 101); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        uLongf bytes = sizeof packed, back = sizeof again;
        text[size % BYTES] ^= 1;
        if (compress2(packed, &bytes, text, BYTES, 6) != Z_OK) give_up("zlib: compress2");
        if (uncompress(again, &back, packed, bytes) != Z_OK) give_up("zlib: uncompress");
        if (back != BYTES || memcmp(text, again, BYTES) != 0) give_up("zlib: round trip");
        sum = fold(fold_word(sum, crc32(0, packed, (uInt)bytes)), packed, bytes);
    }
    return sum;
}
