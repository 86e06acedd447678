/* Brotli at quality 6: 512 KB of text compressed and expanded again. */
#include "bench.h"
#include <brotli/decode.h>
#include <brotli/encode.h>

enum { BYTES = 512 << 10 };
static unsigned char text[BYTES], packed[2 * BYTES], again[BYTES];

void prepare(void) { make_text(text, BYTES, 113); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    while (size--) {
        size_t bytes = sizeof packed, back = sizeof again;
        text[size % BYTES] ^= 1;
        if (!BrotliEncoderCompress(6, 20, BROTLI_MODE_TEXT, BYTES, text, &bytes, packed))
            give_up("brotli: compress");
        if (BrotliDecoderDecompress(bytes, packed, &back, again) != BROTLI_DECODER_RESULT_SUCCESS)
            give_up("brotli: decompress");
        if (back != BYTES || memcmp(text, again, BYTES) != 0) give_up("brotli: round trip");
        sum = fold(sum, packed, bytes);
    }
    return sum;
}
