/* Text out and lines in; and the two functions that a C compiler calls by itself. */
#include "machine.h"

static char line[128];
static int length, is_whole;

static void number(char *to, u64 value, int base)
{
    char digits[20];
    int n = 0;
    u32 high = value >> 32, low = value;
    do { /* no 64-bit division on 32 bits */
        u32 rest = 0;
        u32 parts[4] = {high >> 16, high & 0xFFFF, low >> 16, low & 0xFFFF};
        for (int k = 0; k < 4; k++) {
            u32 part = rest << 16 | parts[k];
            parts[k] = part / base;
            rest = part % base;
        }
        high = parts[0] << 16 | parts[1];
        low = parts[2] << 16 | parts[3];
        digits[n++] = "0123456789abcdef"[rest];
    } while (high | low);
    while (n)
        *to++ = digits[--n];
    *to = 0;
}

static word length_of(const char *text)
{
    word n = 0;
    while (text[n])
        n++;
    return n;
}

void print(const char *format, ...)
{
    __builtin_va_list arguments;
    char text[24];
    __builtin_va_start(arguments, format);
    while (*format) {
        const char *out = format;
        word n = 0;
        while (format[n] && format[n] != '%')
            n++;
        if (!n) {
            char kind = format[1];
            if (kind == 's')
                out = __builtin_va_arg(arguments, const char *);
            else {
                word value = __builtin_va_arg(arguments, word);
                number(text, value, kind == 'd' ? 10 : 16);
                out = text;
            }
            format += 2;
            n = length_of(out);
        } else {
            format += n;
        }
        machine_write(out, n);
    }
    __builtin_va_end(arguments);
}

void panic(const char *why)
{
    print("the kernel stops: %s\n", why);
    machine_off();
}

/* Take what was typed, and echo it. */
int line_poll(void)
{
    int byte;
    while (!is_whole && (byte = machine_read()) >= 0) {
        char c = byte == '\r' ? '\n' : byte;
        if (c == '\b' || c == 127) {
            length -= length > 0;
            continue;
        }
        machine_write(&c, 1);
        if (c == '\n' || length == sizeof line - 1)
            is_whole = 1;
        else
            line[length++] = c;
    }
    return is_whole;
}

int line_read(char *to, int most)
{
    int n = length < most ? length : most;
    memcpy(to, line, n);
    length = is_whole = 0;
    return n;
}

void *memset(void *to, int byte, word bytes)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, word bytes)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    return start;
}
