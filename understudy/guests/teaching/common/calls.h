/* System calls: number in AX, arguments in BX, CX, DX, INT 80h; the result comes in AX. */
#ifndef CALLS_H
#define CALLS_H
enum call {
    C_EXIT, C_FORK, C_WAIT, C_WRITE, C_READ, C_SLEEP, C_TIME, C_ID, C_TLS, C_WATCH, C_YIELD,
    C_FREE, C_OPTION, C_OFF, C_BENCH
};
enum bench {
    B_IRQ, B_STATE, B_MAP, B_SWITCH, B_PORT, B_PRIORITY, B_CALL, B_DIVIDE, B_FAULT, B_ENTRY, B_TIME
};
#endif
