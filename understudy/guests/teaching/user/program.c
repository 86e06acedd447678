/* The first process: a self-check, something to be counted, or a shell, as the kernel was told. */
#include "user.h"

static word parse(const char *text)
{
    word value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + *text++ - '0';
    return value;
}

/* --- for who counts from outside: N of something, between two lines --- */

static volatile u8 *const heap = (u8 *)0x800000;
static word touched; /* pages of the heap, by the last `many touch N` */

static void nothing(void) {}

static void write_again(void)
{
    for (word n = 0; n < touched; n++)
        heap[n * 4096] = 2;
}

static const struct { char name[8]; word what; } benches[] = { /* the kernel's own */
    {"irq", B_IRQ}, {"state", B_STATE}, {"map", B_MAP}, {"root", B_SWITCH}, {"in", B_PORT},
    {"cr8wr", B_PRIORITY}, {"callret", B_CALL}, {"divzero", B_DIVIDE}, {"pgfault", B_FAULT},
    {"ptemod", B_ENTRY}, {"rdtsc", B_TIME},
};

static int bench(const char *what, word times)
{
    for (word n = 0; n < sizeof benches / sizeof *benches; n++)
        if (same(what, benches[n].name)) {
            call(C_BENCH, benches[n].what, times);
            return 1;
        }
    return 0;
}

static void many(const char *what, word times)
{
    say("begin\n");
    if (bench(what, times))
        ;
    else if (same(what, "call"))
        for (word n = 0; n < times; n++)
            call(C_ID, 0, 0);
    else if (same(what, "touch"))
        for (touched = 0; touched < times; touched++)
            heap[touched * 4096] = 1;
    else if (same(what, "fork"))
        for (word n = 0; n < times; n++)
            child(nothing);
    else if (same(what, "cow")) /* the child writes all of the heap, then the parent does */
        for (word n = 0; n < times; n++)
            child(write_again), write_again();
    else
        say("unknown\n");
    say("end\n");
}

/* --- the shell --- */

static void help(void)
{
    say("check  self-check     echo TEXT      time   since the start, in ms\n"
        "free   frames left    many WHAT N    sleep MS\n"
        "off    power off      WHAT: irq state map root in cr8wr callret divzero pgfault ptemod\n"
        "                            rdtsc call touch fork cow\n");
}

static char *word_of(char **line)
{
    char *start = *line, *at;
    while (*start == ' ')
        start++;
    for (at = start; *at && *at != ' '; at++)
        ;
    *line = *at ? at + 1 : at;
    *at = 0;
    return start;
}

void shell(void)
{
    char line[100];
    help();
    for (;;) {
        char *rest = line, *name;
        say("$ ");
        int n = call(C_READ, (word)line, sizeof line - 1);
        if (n < 0)
            return;
        line[n] = 0;
        name = word_of(&rest);
        if (same(name, "check")) {
            self_check();
        } else if (same(name, "echo")) {
            say(rest);
            say("\n");
        } else if (same(name, "time")) {
            unsigned long long now;
            call(C_TIME, (word)&now, 0);
            say_number((u32)(now >> 20)); /* near enough, and no 64-bit division */
            say("\n");
        } else if (same(name, "free")) {
            say_number(call(C_FREE, 0, 0));
            say("\n");
        } else if (same(name, "sleep")) {
            sleep_ms(parse(rest));
        } else if (same(name, "many")) {
            char *what = word_of(&rest);
            many(what, parse(rest));
        } else if (same(name, "off")) {
            call(C_OFF, 0, 0);
        } else if (*name) {
            help();
        }
    }
}

__attribute__((section(".text.start"), noreturn)) void user_start(void)
{
    if (has_option("check"))
        leave(self_check());
    shell();
    leave(0);
}
