/* A token to another process and back over two pipes. */
#include "os.h"

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    int there[2], back[2];
    uint32_t token = 1;
    open_pipe(there);
    open_pipe(back);
    if (split() == 0) {
        close(there[1]);
        for (;;) pass(back[1], receive(there[0]) * 3 + 1);
    }
    for (uint64_t i = 0; i < size; i++) {
        pass(there[1], token);
        token = receive(back[0]);
    }
    close(there[1]);
    return token;
}
