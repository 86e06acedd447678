/* A byte-code interpreter with computed goto: one indirect jump for each guest operation. */
#include "bench.h"

enum { PUSH, ADD, MUL, XOR, DUP, DROP, LOAD, STORE, LESS, LOOP, END };

/* for (i = 1000; i; i--) { acc = (acc * 31 + i) ^ (acc < i); } */
static const unsigned char program[] = {
    LOAD, 0, PUSH, 31, MUL, LOAD, 1, ADD, DUP, DROP, LOAD, 0, LOAD, 1, LESS, XOR, STORE, 0, LOOP, 1, END,
};

static uint64_t run(uint64_t *variables) {
    static const void *const targets[] = {&&push, &&add, &&mul, &&xor_, &&dup, &&drop,
                                          &&load, &&store, &&less, &&loop, &&end};
    uint64_t stack[32], *top = stack;
    const unsigned char *at = program;
#define NEXT goto *targets[*at++]
    NEXT;
push: *++top = *at++; NEXT;
add: top--; *top += top[1]; NEXT;
mul: top--; *top *= top[1]; NEXT;
xor_: top--; *top ^= top[1]; NEXT;
dup: top[1] = *top; top++; NEXT;
drop: top--; NEXT;
load: *++top = variables[*at++]; NEXT;
store: variables[*at++] = *top--; NEXT;
less: top--; *top = *top < top[1]; NEXT;
loop: if (--variables[*at++]) at = program; NEXT;
end: return variables[0];
}

uint64_t bench(uint64_t size) {
    uint64_t variables[2] = {1, 0};
    while (size--) {
        variables[1] = 1000;
        run(variables);
    }
    return variables[0];
}
