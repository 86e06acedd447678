/* fork and exec of a static program that exits at once (this one, told so), wait. */
#include "os.h"

extern char **environ;

__attribute__((constructor)) static void exit_at_once(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "exit") == 0) _exit(7);
}

void prepare(void) { stay_on_one_cpu(); }

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        pid_t child = split();
        if (child == 0) {
            char *arguments[] = {"exec", "exit", NULL};
            execve("/proc/self/exe", arguments, environ);
            _exit(1);
        }
        sum = fold_word(sum, reap(child));
    }
    return sum;
}
