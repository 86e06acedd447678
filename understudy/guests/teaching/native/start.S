/* Where a processor begins: entered as Linux kernels are (SI: the "zero page"), paging off or a map
 * of the lowest 4 GBytes.  The first page tables lie ready in the file.
 */
#ifdef __x86_64__
#define PHYSICAL(symbol) symbol - 0xFFFFFFFF80000000
        .macro entry table, flags
        .quad PHYSICAL(\table) + \flags
        .endm
#else
#define PHYSICAL(symbol) symbol - 0xC0000000
        .macro entry table, flags
        .long PHYSICAL(\table) + \flags, 0
        .endm
#endif
        .section .boot, "ax"
        .global start
#ifdef __x86_64__
        .code64
start:
        mov $PHYSICAL(boot_root), %eax
        mov %rax, %cr3
        mov %cr4, %rax
        or $0x200, %eax                 /* OSFXSR */
        mov %rax, %cr4
        mov %cr0, %rax
        and $~4, %eax                   /* no emulation of the FPU */
        or $0x10002, %eax               /* WP, MP */
        mov %rax, %cr0
        mov $boot_stack, %rsp
        mov %rsi, %rdi
        mov $machine_start, %rax
        call *%rax
#else
        .code32
start:
        mov $PHYSICAL(boot_root), %eax
        mov %eax, %cr3
        mov %cr4, %eax
        or $0x220, %eax                 /* OSFXSR, PAE */
        mov %eax, %cr4
        mov %cr0, %eax
        and $~4, %eax
        or $0x80010002, %eax            /* PG, WP, MP */
        mov %eax, %cr0
        mov $boot_stack, %esp
        push %esi
        mov $machine_start, %eax
        call *%eax
#endif

        .data
        .global boot_root
        .balign 4096
#ifdef __x86_64__
boot_root:
        entry boot_low, 3
        .fill 510, 8, 0
        entry boot_upper, 3
boot_low:                               /* for the instructions above, which lie low */
        entry boot_pages, 3
        .fill 511, 8, 0
boot_upper:
        .fill 510, 8, 0
        entry boot_pages, 3
        .quad 0
#else
boot_root:
        entry boot_pages, 1
        .quad 0, 0
        entry boot_pages, 1
#endif
        .balign 4096
boot_pages:                             /* 2 MBytes each */
        .set n, 0
        .rept 16
        .quad n * 0x200000 + 0x83
        .set n, n + 1
        .endr
        .fill 496, 8, 0

        .bss
        .balign 16
        .skip 8192
boot_stack:
        .section .note.GNU-stack,"",@progbits
