/* Five bodies under gravity: scalar double precision with square roots. */
#include "bench.h"

enum { BODIES = 5 };
static struct body {
    double x[3], v[3], mass;
} bodies[BODIES];

static void advance(double dt) {
    for (int i = 0; i < BODIES; i++)
        for (int j = i + 1; j < BODIES; j++) {
            double d[3], square = 0.01;
            for (int k = 0; k < 3; k++) {
                d[k] = bodies[i].x[k] - bodies[j].x[k];
                square += d[k] * d[k];
            }
            double pull = dt / (square * __builtin_sqrt(square));
            for (int k = 0; k < 3; k++) {
                bodies[i].v[k] -= d[k] * bodies[j].mass * pull;
                bodies[j].v[k] += d[k] * bodies[i].mass * pull;
            }
        }
    for (int i = 0; i < BODIES; i++)
        for (int k = 0; k < 3; k++) bodies[i].x[k] += dt * bodies[i].v[k];
}

uint64_t bench(uint64_t size) {
    uint64_t state = 9;
    for (int i = 0; i < BODIES; i++) {
        for (int k = 0; k < 3; k++) {
            bodies[i].x[k] = (double)(next_random(&state) % 2000) / 100.0 - 10.0;
            bodies[i].v[k] = (double)(next_random(&state) % 2000) / 1000.0 - 1.0;
        }
        bodies[i].mass = 1.0 + i;
    }
    for (uint64_t i = 0; i < size * 1000; i++) advance(0.001);
    return fold(0, bodies, sizeof bodies);
}
