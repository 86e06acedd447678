/* A fast Fourier transform of 4,096 complex doubles, forth and back (SSE2). */
#include "bench.h"
#include <math.h>

enum { N = 4096 };
static double re[N], im[N], cosine[N], sine[N];

void prepare(void) {
    for (int i = 0; i < N; i++) {
        cosine[i] = cos(2 * M_PI * i / N);
        sine[i] = sin(2 * M_PI * i / N);
        re[i] = (double)(i * 7919 % 1000) / 1000;
    }
}

static void transform(double direction) {
    for (unsigned i = 1, j = 0; i < N; i++) {
        unsigned bit = N / 2;
        for (; j & bit; bit /= 2) j ^= bit;
        j ^= bit;
        if (i < j) {
            double x = re[i], y = im[i];
            re[i] = re[j], im[i] = im[j], re[j] = x, im[j] = y;
        }
    }
    for (int half = 1; half < N; half *= 2)
        for (int from = 0; from < N; from += 2 * half)
            for (int k = 0; k < half; k++) {
                int turn = k * (N / 2 / half), a = from + k, b = a + half;
                double c = cosine[turn], s = direction * sine[turn];
                double x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
                re[b] = re[a] - x, im[b] = im[a] - y;
                re[a] += x, im[a] += y;
            }
}

uint64_t bench(uint64_t size) {
    while (size--) {
        transform(1);
        re[size % N] += 1e-3;
        transform(-1);
        for (int i = 0; i < N; i++) re[i] /= N, im[i] /= N;
    }
    uint64_t sum = 0;
    for (int i = 0; i < N; i += 17) sum = fold_double(fold_double(sum, re[i]), im[i]);
    return sum;
}
