/* Matrix product of 64 x 64 doubles, the textbook's three loops. */
#include "bench.h"

enum { N = 64 };
static double a[N][N], b[N][N], c[N][N];

uint64_t bench(uint64_t size) {
    uint64_t state = 5;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = (double)(next_random(&state) % 1000) / 500.0 - 1.0;
            b[i][j] = (double)(next_random(&state) % 1000) / 500.0 - 1.0;
        }
    while (size--) {
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double sum = 0;
                for (int k = 0; k < N; k++) sum += a[i][k] * b[k][j];
                c[i][j] = sum;
            }
        a[size % N][(size >> 6) % N] = c[1][2] / 64.0;
    }
    return fold(0, c, sizeof c);
}
