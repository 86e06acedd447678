/* What programs ask the kernel for. */
#ifndef USER_H
#define USER_H
#include "../common/calls.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long word;

static inline word call(word number, word a, word b)
{
    word result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b) : "memory");
    return result;
}

static inline int fork(void) { return call(C_FORK, 0, 0); }
static inline int wait_for(int *status) { return call(C_WAIT, (word)status, 0); }
static inline void sleep_ms(word ms) { call(C_SLEEP, ms, 0); }
static inline void yield(void) { call(C_YIELD, 0, 0); }
__attribute__((noreturn)) static inline void leave(int status)
{
    call(C_EXIT, status, 0);
    for (;;)
        ;
}
static inline int has_option(const char *name) { return call(C_OPTION, (word)name, 0); }

void say(const char *text);
void say_number(word value);
int same(const char *a, const char *b);
int child(void (*work)(void)); /* what a child that does this ends with */
int self_check(void);          /* how many checks have failed */
void shell(void);

#endif
