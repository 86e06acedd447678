/* The tiny C compiler, as a library, compiling one source text of 150 functions again and again. */
#include "bench.h"
#include <libtcc.h>
#include <stdio.h>

static char source[1 << 16];

void prepare(void) {
    size_t at = 0;
    at += (size_t)sprintf(source, "typedef struct item { long key; struct item *next; } item;\n"
                                  "#define MIX(a, b) (((a) << 3 ^ (b)) + ((a) >> 2))\n");
    for (int i = 0; i < 150; i++)
        at += (size_t)sprintf(source + at,
                              "static long f%d(item *list, long x) {\n"
                              "    long sum = x * %d, i;\n"
                              "    for (i = 0; i < %d; i++) {\n"
                              "        if (i %% 3 == 1 && x > i) sum += MIX(sum, i * %d);\n"
                              "        else switch (i & 3) { case 0: sum ^= x; break; default: sum--; }\n"
                              "    }\n"
                              "    for (; list; list = list->next) sum += list->key;\n"
                              "    return sum + %s;\n}\n",
                              i, i + 3, i % 9 + 2, i * 7 + 1, i ? "f0(0, x)" : "1");
    at += (size_t)sprintf(source + at, "long all(long x) {\n    item i = {x, 0};\n");
    for (int i = 0; i < 150; i++) at += (size_t)sprintf(source + at, "    x += f%d(&i, x);\n", i);
    sprintf(source + at, "    return x;\n}\n");
}

/* Only the last compilation's code is run: the row is about a compiler, not about fresh code. */
uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t left = size; left--;) {
        TCCState *compiler = tcc_new();
        tcc_set_options(compiler, "-nostdlib -nostdinc");
        tcc_set_output_type(compiler, TCC_OUTPUT_MEMORY);
        if (tcc_compile_string(compiler, source) < 0) give_up("tcc: compile");
        sum = fold_word(sum, (uint64_t)tcc_relocate(compiler, left ? NULL : TCC_RELOCATE_AUTO));
        if (left == 0) {
            long (*all)(long) = (long (*)(long))tcc_get_symbol(compiler, "all");
            if (!all) give_up("tcc: symbol");
            sum = fold_word(sum, (uint64_t)all((long)size));
        }
        tcc_delete(compiler);
    }
    return sum;
}
