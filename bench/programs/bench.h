/* What every program of the benchmark shares: one timed function, and a few deterministic inputs.
 *
 * harness.c prints "S" before bench() and "E <checksum>" after it; the host stamps both lines as
 * they arrive, so no clock of a guest is ever asked. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

uint64_t bench(uint64_t size);  /* the timed part; returns a checksum of what it computed */
void prepare(void);             /* the untimed part; empty unless the program defines it */

/* English-looking text: words of very uneven frequency, so that compressors find something. */
void make_text(unsigned char *out, size_t bytes, uint64_t seed);

/* Ends the program with a reason on standard error and status 1. */
void give_up(const char *reason);

static inline uint64_t next_random(uint64_t *state) {
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static inline uint64_t fold_word(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
    return sum ^ (sum >> 29);
}

static inline uint64_t fold(uint64_t sum, const void *data, size_t bytes) {
    const unsigned char *p = (const unsigned char *)data;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        sum = fold_word(sum, word);
    }
    while (bytes--) sum = fold_word(sum, *p++);
    return sum;
}

static inline uint64_t fold_double(uint64_t sum, double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return fold_word(sum, bits);
}

#ifdef __cplusplus
}
#endif
