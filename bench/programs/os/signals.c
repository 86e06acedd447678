/* A signal sent to oneself, its handler, and the return from it. */
#include "os.h"

static volatile uint64_t caught;

static void count(int signal) { caught += (uint64_t)signal; }

uint64_t bench(uint64_t size) {
    struct sigaction action = {.sa_handler = count};
    sigaction(SIGUSR1, &action, NULL);
    for (uint64_t i = 0; i < size * 100; i++) raise(SIGUSR1);
    return caught;
}
