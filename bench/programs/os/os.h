/* What the operating-system rows share: one processor for everybody, and pipes that must not fail. */
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "bench.h"
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The guests have one processor; natively all processes of a row share one as well. */
static inline void stay_on_one_cpu(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set)) give_up("sched_getaffinity");
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0; cpu--)
        if (CPU_ISSET(cpu, &set)) {
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            break;
        }
    if (sched_setaffinity(0, sizeof set, &set)) give_up("sched_setaffinity");
}

static inline void open_pipe(int ends[2]) {
    if (pipe(ends)) give_up("pipe");
}

static inline uint32_t receive(int fd) {
    uint32_t token;
    if (read(fd, &token, sizeof token) != sizeof token) _exit(0);
    return token;
}

static inline void pass(int fd, uint32_t token) {
    if (write(fd, &token, sizeof token) != sizeof token) _exit(3);
}

static inline pid_t split(void) {
    pid_t child = fork();
    if (child < 0) give_up("fork");
    return child;
}

static inline uint64_t reap(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) give_up("a child did not exit");
    return (uint64_t)WEXITSTATUS(status);
}
