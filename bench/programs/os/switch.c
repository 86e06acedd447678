/* A token round a ring of eight processes, each of which walks over 32 KB of its own. */
#include "os.h"

enum { RING = 8, BYTES = 32 << 10 };
static uint32_t own[BYTES / 4];

static uint32_t walk(uint32_t token) {
    for (size_t i = 0; i < BYTES / 4; i += 16) token += own[i]++;
    return token;
}

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    int links[RING][2];
    uint32_t token = 1;
    for (int i = 0; i < RING; i++) open_pipe(links[i]);
    for (int me = 1; me < RING; me++) {
        if (split() != 0) continue;
        for (int i = 0; i < RING; i++) {
            if (i != (me + 1) % RING) close(links[i][1]);
            if (i != me) close(links[i][0]);
        }
        for (;;) pass(links[(me + 1) % RING][1], walk(receive(links[me][0])));
    }
    for (uint64_t i = 0; i < size; i++) {
        pass(links[1][1], token);
        token = walk(receive(links[0][0]));
    }
    for (int i = 0; i < RING; i++) close(links[i][1]);
    return token;
}
