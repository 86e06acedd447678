# The guest's side of the agent: makes system calls for the host, and knows nothing else.  What they
# are for is decided in understudy/agent/; the other ends are understudy/devices/agent.py and
# understudy/devices/virtio/agent.py.
#
# A program for Linux on i386, which every kernel of Debian runs, with nothing beside it: no shell, no
# file and no stream that others write to lies between a command's end and the host.
# agent_program.py has its bytes; after a change: python -m tools.agent_program
#
# Standard input is the channel: a port of a virtio console.  With an argument it is only a bell, and
# what is said goes over the agent's own two registers, which only it may use.
#
# A request is a number of bytes, and so many bytes, which come to lie at REQUEST:
#     calls, bytes of them to send back from CALLS on, spans, 0
#     calls:  number, then the result | arguments that are the address of their value, as bits | six
#             arguments
#     spans:  address, address of the length
#     whatever the calls point to
# The answer is the bytes from CALLS on, and after them the spans.

        .intel_syntax noprefix
        .code32

        .set PORT, 0x5A0                # what is said; the next register: here I am
        .set VARIABLES, 0x08049000
        .set BELL, VARIABLES            # whether the channel is one
        .set AT, VARIABLES + 4          # the next call
        .set LEFT, VARIABLES + 8        # how many there are from there on
        .set JUNK, VARIABLES + 12
        .set REQUEST, 0x0804A000
        .set CALLS, REQUEST + 16
        .set CALL, 32                   # bytes of one
        .set FORK, 2

        .macro call_linux number
        mov     eax, \number
        int     0x80
        .endm

        .globl _start
_start:
        pop     ebx                     # argc
        dec     ebx
        mov     [BELL], ebx
        jz      next
        mov     ebx, PORT               # ioperm(PORT, 8, 1)
        mov     ecx, 8
        mov     edx, 1
        call_linux 101
        test    eax, eax
        jnz     exit
        mov     edx, PORT + 4           # here I am
        out     dx, eax

next:
        cmp     dword ptr [BELL], 0
        je      length
        xor     ebx, ebx                # read(0, JUNK, 1): one byte for each request
        mov     ecx, JUNK
        mov     edx, 1
        call_linux 3
        cmp     eax, 1
        jne     exit
length:
        mov     edi, REQUEST
        mov     esi, 4
        call    receive
        mov     edi, REQUEST
        mov     esi, [REQUEST]
        call    receive
        mov     dword ptr [AT], offset CALLS
        mov     eax, [REQUEST]
        mov     [LEFT], eax

one:
        dec     dword ptr [LEFT]
        js      answer
        mov     ebp, [AT]
        mov     ecx, 5
argument:
        bt      dword ptr [ebp + 4], ecx
        jnc     itself
        mov     eax, [ebp + ecx * 4 + 8]
        mov     eax, [eax]
        mov     [ebp + ecx * 4 + 8], eax
itself:
        dec     ecx
        jns     argument
        mov     eax, [ebp]
        mov     ebx, [ebp + 8]
        mov     ecx, [ebp + 12]
        mov     edx, [ebp + 16]
        mov     esi, [ebp + 20]
        mov     edi, [ebp + 24]
        mov     ebp, [ebp + 28]
        int     0x80
        mov     ebp, [AT]
        mov     ecx, [ebp]
        mov     [ebp], eax
        mov     edx, [ebp + 8]
        add     dword ptr [AT], CALL
        cmp     ecx, FORK
        jne     one
        test    eax, eax                # the child goes on here; its last call ends it
        jz      one
        sub     [LEFT], edx             # the parent goes on after as many as the argument says
        shl     edx, 5
        add     [AT], edx
        jmp     one

answer:
        mov     esi, offset CALLS
        mov     ecx, [REQUEST + 4]
        call    send
        mov     edi, [REQUEST]
        shl     edi, 5
        add     edi, offset CALLS
        mov     ebp, [REQUEST + 8]
span:
        dec     ebp
        js      next
        mov     esi, [edi]
        mov     ecx, [edi + 4]
        mov     ecx, [ecx]
        add     edi, 8
        cmp     ecx, 0
        jle     span
        call    send
        jmp     span

receive:                                # esi bytes to edi
        cmp     dword ptr [BELL], 0
        jne     receive_string
        test    esi, esi
        jz      done
        xor     ebx, ebx                # read(0, edi, esi)
        mov     ecx, edi
        mov     edx, esi
        call_linux 3
        cmp     eax, 0
        jle     exit                    # no channel any more
        add     edi, eax
        sub     esi, eax
        jmp     receive
receive_string:
        mov     ecx, esi
        mov     edx, PORT
        rep insb
done:
        ret

send:                                   # ecx bytes from esi
        cmp     dword ptr [BELL], 0
        jne     send_string
        test    ecx, ecx
        jz      done
        mov     edx, ecx                # write(0, esi, ecx)
        mov     ecx, esi
        xor     ebx, ebx
        call_linux 4
        cmp     eax, 0
        jle     exit
        mov     ecx, edx
        add     esi, eax
        sub     ecx, eax
        jmp     send
send_string:
        mov     edx, PORT
        rep outsb
        ret

exit:
        xor     ebx, ebx
        call_linux 1
