/* main() of every benchmark program: prepare, mark, work, mark. */
#include "bench.h"
#include <stdio.h>
#include <unistd.h>

__attribute__((weak)) void prepare(void) {}

void give_up(const char *reason) {
    fprintf(stderr, "bench: %s\n", reason);
    exit(1);
}

static void say(const char *line, size_t bytes) {
    if (write(1, line, bytes) != (ssize_t)bytes) _exit(2);
}

void make_text(unsigned char *out, size_t bytes, uint64_t seed) {
    enum { WORDS = 3000, LONGEST = 11 };
    static char words[WORDS][LONGEST + 1];
    uint64_t state = seed | 1;
    for (int w = 0; w < WORDS; w++) {
        int length = 2 + (int)(next_random(&state) % (LONGEST - 2));
        for (int i = 0; i < length; i++)
            words[w][i] = "etaoinshrdlucmfwypvbgkjqxz"[(next_random(&state) % 26) *
                                                       (next_random(&state) % 26) / 26];
        words[w][length] = 0;
    }
    size_t at = 0;
    while (at < bytes) {
        uint64_t r = next_random(&state);
        uint64_t skew = (r % WORDS) * ((r >> 20) % WORDS) / WORDS * ((r >> 40) % WORDS) / WORDS;
        for (const char *c = words[skew]; *c && at < bytes; c++) out[at++] = (unsigned char)*c;
        if (at < bytes) out[at++] = (r >> 60) == 0 ? '\n' : (r >> 60) == 1 ? '.' : ' ';
    }
}

int main(int argc, char **argv) {
    uint64_t size = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    char line[32];
    prepare();
    say("S\n", 2);
    uint64_t sum = bench(size);
    int bytes = snprintf(line, sizeof line, "E %016llx\n", (unsigned long long)sum);
    say(line, (size_t)bytes);
    return 0;
}
