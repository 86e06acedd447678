# The guest's side of the agent: runs commands for the host, one at a time.  The other side, and
# what the two ports mean, is understudy/devices/agent.py.
#
# A program for Linux on i386, which every kernel of Debian runs, in two ports that only it may use:
# no shell, no file and no stream of bytes lies between a command's end and the host.
# agent_program.py has its bytes; after a change: python -m tools.agent_program
#
# Standard input is the serial line by which the host rings.  One loop waits for three things: a
# child that has ended, output of the command, the bell.

        .intel_syntax noprefix
        .code32

        .set PORT, 0x5A0                # output out, a command in
        .set CONTROL, 0x5A4             # see devices/agent.py
        .set MOST, 0x10000              # bytes at once: as many as a pipe holds

        .set FDS, 0x08049000            # struct pollfd [3]: signals, pipe, bell
        .set SIGNALS, FDS
        .set PIPE, FDS + 8
        .set BELL, FDS + 16
        .set EVENTS, 4                  # in a struct pollfd
        .set REVENTS, 6
        .set JOB, FDS + 24              # process ID of the command, 0 if there is none
        .set COUNT, FDS + 28
        .set STATUS, FDS + 32
        .set ENDS, FDS + 36             # of a new pipe: reading, writing
        .set CHLD, FDS + 44             # signal set with SIGCHLD only
        .set NONE, FDS + 52             # signal set with nothing, 8 bytes of 0
        .set BUFFER, 0x0804A000         # MOST bytes

        .set POLLIN, 1
        .set POLLHUP, 0x10

        .macro call_linux number
        mov     eax, \number
        int     0x80
        .endm

        .globl _start
_start:
        pop     eax                     # argc
        lea     ebp, [esp + eax * 4 + 4]  # the environment, for commands
        mov     ebx, PORT               # ioperm(PORT, 8, 1)
        mov     ecx, 8
        mov     edx, 1
        call_linux 101
        test    eax, eax
        jnz     exit
        mov     byte ptr [CHLD + 2], 1  # bit 16: SIGCHLD is signal 17
        xor     ebx, ebx                # rt_sigprocmask(SIG_BLOCK, CHLD, NULL, 8)
        mov     ecx, CHLD
        xor     edx, edx
        mov     esi, 8
        call_linux 175
        mov     ebx, -1                 # signalfd4(-1, CHLD, 8, SFD_CLOEXEC)
        mov     edx, 8
        mov     esi, 0x80000
        call_linux 327
        mov     [SIGNALS], eax
        mov     byte ptr [SIGNALS + EVENTS], POLLIN
        mov     dword ptr [PIPE], -1
        mov     byte ptr [PIPE + EVENTS], POLLIN
        mov     byte ptr [BELL + EVENTS], POLLIN
        mov     edx, CONTROL            # here I am
        xor     eax, eax
        out     dx, eax

next:
        mov     ebx, FDS                # poll(FDS, 3, -1)
        mov     ecx, 3
        mov     edx, -1
        call_linux 168
        test    eax, eax
        js      next
        cmp     byte ptr [SIGNALS + REVENTS], 0
        jne     child
        cmp     byte ptr [PIPE + REVENTS], 0
        jne     output
        cmp     byte ptr [BELL + REVENTS], 0
        jne     bell
        jmp     next

# --- output of the command ---

output:
        mov     edx, MOST
        call    pump
        jg      next
        call    close_pipe              # nobody can write any more
        jmp     next

pump:                                   # edx bytes at most from the pipe to the host; flags of
        mov     ebx, [PIPE]             # what read() gave: greater than 0 if there were some
        mov     ecx, BUFFER
        call_linux 3
        test    eax, eax
        jle     pumped
        mov     ecx, eax
        mov     esi, BUFFER
        mov     edx, PORT
        rep outsb
        test    eax, eax
pumped:
        ret

close_pipe:
        mov     ebx, [PIPE]             # close(pipe)
        call_linux 6
        mov     dword ptr [PIPE], -1
left:
        ret

leave_pipe:                             # its command is over
        cmp     dword ptr [PIPE], 0
        jl      left
        mov     ebx, PIPE               # poll(PIPE, 1, 0)
        mov     ecx, 1
        xor     edx, edx
        call_linux 168
        test    byte ptr [PIPE + REVENTS], POLLHUP
        jnz     close_pipe
        call_linux 2                    # fork(): what a program in the background still writes
        test    eax, eax                # goes nowhere, and the program lives
        jnz     close_pipe
sink:
        mov     ebx, [PIPE]
        mov     ecx, BUFFER
        mov     edx, MOST
        call_linux 3
        test    eax, eax
        jg      sink
exit:
        xor     ebx, ebx
        call_linux 1

# --- a child has ended ---

child:
        mov     ebx, [SIGNALS]          # read(signals, BUFFER, 128)
        mov     ecx, BUFFER
        mov     edx, 128
        call_linux 3
reap:
        mov     ebx, -1                 # waitpid(-1, STATUS, WNOHANG)
        mov     ecx, STATUS
        mov     edx, 1
        call_linux 7
        test    eax, eax
        jle     next
        cmp     eax, [JOB]
        jne     reap
        mov     dword ptr [JOB], 0
        mov     dword ptr [COUNT], 0    # what it has written is in the pipe: that much and no more,
        mov     ebx, [PIPE]             # others may write for ever: ioctl(pipe, FIONREAD, COUNT)
        mov     ecx, 0x541B
        mov     edx, COUNT
        call_linux 54
drain:
        mov     edx, [COUNT]
        cmp     edx, 0
        jle     drained
        cmp     edx, MOST
        jbe     some
        mov     edx, MOST
some:
        call    pump
        jle     drained
        sub     [COUNT], eax
        jmp     drain
drained:
        call    leave_pipe
        mov     eax, [STATUS]           # as a shell says it: 128 + n after signal n
        mov     ecx, eax
        and     ecx, 0x7F
        jz      by_itself
        lea     eax, [ecx + 128]
        jmp     tell
by_itself:
        movzx   eax, ah
tell:
        or      ah, 1
        mov     edx, CONTROL
        out     dx, eax
        jmp     reap

# --- the bell: there is a command ---

bell:
        xor     ebx, ebx                # read(0, BUFFER, 128)
        mov     ecx, BUFFER
        mov     edx, 128
        call_linux 3
        test    eax, eax
        jle     exit                    # no line any more
        mov     edx, CONTROL            # take it: its bytes, or -1 if there is none
        in      eax, dx
        cmp     eax, -1
        je      next
        mov     [COUNT], eax
        mov     ebx, [JOB]
        test    ebx, ebx
        jz      alone
        neg     ebx                     # the host has given up the one before: kill(-job, SIGKILL)
        mov     ecx, 9
        call_linux 37
        mov     ebx, [JOB]              # kill(job, SIGKILL): it may not lead its group yet
        call_linux 37
        mov     ebx, [JOB]              # waitpid(job, NULL, 0)
        xor     ecx, ecx
        xor     edx, edx
        call_linux 7
        mov     dword ptr [JOB], 0
alone:
        call    leave_pipe
        mov     ebx, offset command     # open(command, O_WRONLY | O_CREAT | O_TRUNC, 0600)
        mov     ecx, 0x241
        mov     edx, 0x180
        call_linux 5
        test    eax, eax
        js      failed
        mov     ebx, eax
fill:
        mov     ecx, [COUNT]
        jecxz   filled
        cmp     ecx, MOST
        jbe     rest
        mov     ecx, MOST
rest:
        sub     [COUNT], ecx
        mov     esi, ecx
        mov     edi, BUFFER
        mov     edx, PORT
        rep insb
        mov     ecx, BUFFER             # write(file, BUFFER, esi)
        mov     edx, esi
        call_linux 4
        cmp     eax, esi
        je      fill
        call_linux 6                    # close(file): it has not all of it
        jmp     failed
filled:
        call_linux 6                    # close(file)
        mov     ebx, offset ENDS        # pipe2(ENDS, O_CLOEXEC)
        mov     ecx, 0x80000
        call_linux 331
        test    eax, eax
        js      failed
        call_linux 2                    # fork()
        test    eax, eax
        jz      run
        mov     esi, eax
        mov     ebx, [ENDS + 4]         # close(the writing end)
        call_linux 6
        mov     eax, [ENDS]
        mov     [PIPE], eax
        test    esi, esi
        js      not_forked
        mov     [JOB], esi
        jmp     next
not_forked:
        call    close_pipe
failed:
        mov     eax, 0x100 + 126
        mov     edx, CONTROL
        out     dx, eax
        jmp     next

run:
        call_linux 66                   # setsid()
        mov     ebx, PORT               # ioperm(PORT, 8, 0)
        mov     ecx, 8
        xor     edx, edx
        call_linux 101
        mov     ebx, 2                  # rt_sigprocmask(SIG_SETMASK, NONE, NULL, 8)
        mov     ecx, NONE
        mov     esi, 8
        call_linux 175
        xor     ebx, ebx                # close(0)
        call_linux 6
        mov     ebx, offset null        # open("/dev/null", O_RDWR) is 0 again
        mov     ecx, 2
        call_linux 5
        mov     ebx, [ENDS + 4]         # dup2(the writing end, 1), and 2
        mov     ecx, 1
        call_linux 63
        inc     ecx
        call_linux 63
        mov     ebx, offset busybox     # execve(busybox, arguments, environment)
        mov     ecx, offset arguments
        mov     edx, ebp
        call_linux 11
        mov     ebx, 127
        call_linux 1

busybox:        .asciz "/bin/busybox"
shell:          .asciz "sh"
command:        .asciz "/run/agent.command"
null:           .asciz "/dev/null"
arguments:      .long shell, command, 0
