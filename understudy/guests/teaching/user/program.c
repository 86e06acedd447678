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

static void nothing(void) {}

static void many(const char *what, word times)
{
    volatile u8 *heap = (u8 *)0x800000;
    say("begin\n");
    if (same(what, "irq"))
        call(C_BENCH, B_IRQ, times);
    else if (same(what, "state"))
        call(C_BENCH, B_STATE, times);
    else if (same(what, "map"))
        call(C_BENCH, B_MAP, times);
    else if (same(what, "root"))
        call(C_BENCH, B_SWITCH, times);
    else if (same(what, "call"))
        for (word n = 0; n < times; n++)
            call(C_ID, 0, 0);
    else if (same(what, "touch"))
        for (word n = 0; n < times; n++)
            heap[n * 4096] = 1;
    else if (same(what, "fork"))
        for (word n = 0; n < times; n++)
            child(nothing);
    else
        say("unknown\n");
    say("end\n");
}

/* --- the shell --- */

static void help(void)
{
    say("check  self-check     echo TEXT      time   since the start, in ms\n"
        "free   frames left    many WHAT N    sleep MS\n"
        "off    power off      WHAT: irq state map root call touch fork\n");
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
