/* ChaCha20 blocks in plain C: sixteen words alive at once in sixteen registers. */
#include "bench.h"

#define ROTATE(x, n) ((x) << (n) | (x) >> (32 - (n)))
#define QUARTER(a, b, c, d)                  \
    (a += b, d = ROTATE(d ^ a, 16), c += d,  \
     b = ROTATE(b ^ c, 12), a += b, d = ROTATE(d ^ a, 8), c += d, b = ROTATE(b ^ c, 7))

static void block(uint32_t out[16], const uint32_t in[16]) {
    uint32_t a = in[0], b = in[1], c = in[2], d = in[3], e = in[4], f = in[5], g = in[6], h = in[7];
    uint32_t i = in[8], j = in[9], k = in[10], l = in[11];
    uint32_t m = in[12], n = in[13], o = in[14], p = in[15];
    for (int round = 0; round < 10; round++) {
        QUARTER(a, e, i, m);
        QUARTER(b, f, j, n);
        QUARTER(c, g, k, o);
        QUARTER(d, h, l, p);
        QUARTER(a, f, k, p);
        QUARTER(b, g, l, m);
        QUARTER(c, h, i, n);
        QUARTER(d, e, j, o);
    }
    uint32_t mixed[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
    for (int w = 0; w < 16; w++) out[w] = mixed[w] + in[w];
}

uint64_t bench(uint64_t size) {
    uint32_t in[16], out[16];
    uint64_t sum = 0;
    for (uint32_t w = 0; w < 16; w++) in[w] = w * 0x01234567u;
    for (uint64_t i = 0; i < size * 1000; i++) {
        in[12]++;
        block(out, in);
        sum += out[i & 15];
    }
    return fold(sum, out, sizeof out);
}
