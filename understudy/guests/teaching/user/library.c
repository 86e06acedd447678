/* What programs share: words on the console, and children. */
#include "user.h"

void say(const char *text)
{
    word n = 0;
    while (text[n])
        n++;
    call(C_WRITE, (word)text, n);
}

void say_number(word value)
{
    char text[24];
    int n = sizeof text - 1;
    text[n] = 0;
    do
        text[--n] = '0' + value % 10;
    while (value /= 10);
    say(text + n);
}

int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

int child(void (*work)(void))
{
    int status = -1;
    int id = fork();
    if (!id) {
        work();
        leave(0);
    }
    if (id < 0 || wait_for(&status) != id)
        return -1;
    return status;
}
