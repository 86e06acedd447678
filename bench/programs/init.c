/* The first process of the guests: runs what the host asks for on the second serial port.
 *
 *   guest: R                     ready for a request
 *   host:  run PROGRAM ARG...    a path below /, and its arguments
 *   guest: S / E CHECKSUM        printed by the program itself
 *   guest: X STATUS              the program's end
 *   host:  quit                  powers off
 *
 * The environment of the programs is in /bench/environment, one NAME=VALUE a line. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { WORDS = 32, LINE = 1024 };

static void say(int port, const char *text) {
    if (write(port, text, strlen(text)) < 0) perror("bench: ttyS1");
}

static void read_environment(void) {
    static char lines[4096];
    int file = open("/bench/environment", O_RDONLY);
    if (file < 0 || read(file, lines, sizeof lines - 1) < 0) return;
    close(file);
    for (char *line = strtok(lines, "\n"); line; line = strtok(NULL, "\n")) putenv(line);
}

static int open_port(void) {
    struct termios mode;
    int port = open("/dev/ttyS1", O_RDWR | O_NOCTTY);
    if (port < 0 || tcgetattr(port, &mode)) {
        perror("bench: /dev/ttyS1");
        return -1;
    }
    cfmakeraw(&mode);
    mode.c_lflag |= ICANON;
    cfsetspeed(&mode, B115200);
    tcsetattr(port, TCSANOW, &mode);
    return port;
}

static int run(int port, char *request) {
    char *words[WORDS + 1] = {0};
    int count = 0, status = 0;
    for (char *word = strtok(request, " "); word && count < WORDS; word = strtok(NULL, " "))
        words[count++] = word;
    if (count == 0) return 127;
    pid_t child = fork();
    if (child == 0) {
        dup2(open("/dev/null", O_RDONLY), 0);
        dup2(port, 1);
        execv(words[0], words);
        perror(words[0]);
        _exit(127);
    }
    if (child < 0) return 126;
    for (pid_t dead; (dead = wait(&status)) != child;) /* orphans come here to be buried, too */
        if (dead < 0) return 126;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(void) {
    char line[LINE], answer[32];
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/tmp", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, NULL);
    for (int fd = 0; fd < 3; fd++) dup2(open("/dev/console", O_RDWR), fd);
    read_environment();
    int port = open_port();
    if (port < 0) pause();
    say(port, "R\n");
    for (;;) {
        ssize_t bytes = read(port, line, LINE - 1);
        if (bytes <= 0) continue;
        line[bytes - (line[bytes - 1] == '\n')] = 0;
        if (strcmp(line, "quit") == 0) reboot(RB_POWER_OFF);
        if (strncmp(line, "run ", 4) != 0) continue;
        snprintf(answer, sizeof answer, "X %d\n", run(port, line + 4));
        say(port, answer);
    }
}
