/* A small ray tracer in single precision: spheres over a checkered floor (scalar SSE). */
#include "bench.h"
#include <math.h>

enum { BALLS = 6, WIDTH = 48, HEIGHT = 32 };
typedef struct { float x, y, z; } vector;
static struct { vector at; float radius, shine; } balls[BALLS];

static vector along(vector from, vector to, float t) {
    return (vector){from.x + to.x * t, from.y + to.y * t, from.z + to.z * t};
}
static float dot(vector a, vector b) { return a.x * b.x + a.y * b.y + a.z * b.z; }

static float trace(vector eye, vector ray, int depth) {
    float nearest = 1e9f;
    int hit = -1;
    for (int i = 0; i < BALLS; i++) {
        vector to = along(balls[i].at, eye, -1);
        float b = dot(to, ray), d = b * b - dot(to, to) + balls[i].radius * balls[i].radius;
        if (d < 0) continue;
        float t = b - sqrtf(d);
        if (t > 1e-3f && t < nearest) nearest = t, hit = i;
    }
    if (hit < 0 && ray.y < 0) {
        vector at = along(eye, ray, -eye.y / ray.y);
        return ((int)floorf(at.x) + (int)floorf(at.z)) & 1 ? 0.3f : 0.8f;
    }
    if (hit < 0) return 0.5f + ray.y * 0.5f;
    vector at = along(eye, ray, nearest), normal = along(at, balls[hit].at, -1);
    normal = along((vector){0, 0, 0}, normal, 1 / balls[hit].radius);
    float light = normal.y * 0.4f + 0.5f;
    if (depth == 0) return light;
    vector mirror = along(ray, normal, -2 * dot(ray, normal));
    return light * (1 - balls[hit].shine) + balls[hit].shine * trace(at, mirror, depth - 1);
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t frame = 0; frame < size; frame++) {
        for (int i = 0; i < BALLS; i++) {
            balls[i].at = (vector){(float)(i * 3 % 7) - 3, 1 + (float)(i % 2), 4 + (float)(frame % 9 + i)};
            balls[i].radius = 0.6f + 0.1f * (float)i;
            balls[i].shine = 0.15f * (float)i;
        }
        for (int y = 0; y < HEIGHT; y++)
            for (int x = 0; x < WIDTH; x++) {
                vector ray = {(float)(x - WIDTH / 2) / WIDTH, (float)(HEIGHT / 2 - y) / WIDTH, 1};
                ray = along((vector){0, 0, 0}, ray, 1 / sqrtf(dot(ray, ray)));
                sum = fold_double(sum, trace((vector){0, 1.5f, 0}, ray, 4));
            }
    }
    return sum;
}
