/* The machine as a processor and a PC's chips have it: sensitive instructions and ports. */
#include "../common/machine.h"

extern u64 boot_root[];
extern char stubs[], system_call_stub[];

static struct { u16 limit; word base; } __attribute__((packed)) table;
static u64 gdt[9], idt[129 * 2];
static u32 tss[26];

static void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" : : "a"(value), "d"(port)); }

static u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "d"(port));
    return value;
}

/* --- page tables --- */

u64 entry_of(word gpa, u64 flags) { return gpa | flags; }
word gpa_of(u64 entry) { return entry & 0xFFFFF000; }
void entry_write(u64 *at, u64 value) { *(volatile u64 *)at = value; }
void machine_invalidate(word at) { __asm__ volatile("invlpg (%0)" : : "r"(at) : "memory"); }
void machine_commit(void) {}
void machine_table(word gpa) { (void)gpa; }
void machine_root(word gpa) { (void)gpa; }
void machine_root_end(word gpa) { (void)gpa; }
void machine_table_end(word gpa) { (void)gpa; }
void machine_use(word root) { __asm__ volatile("mov %0,%%cr3" : : "r"(root) : "memory"); }
word machine_kernel_root(void) { return GPA(boot_root); }

word fault_address(void)
{
    word at;
    __asm__ volatile("mov %%cr2,%0" : "=r"(at));
    return at;
}

/* --- interrupts --- */

int irq_save(void)
{
    word flags;
    __asm__ volatile("pushf; pop %0; cli" : "=r"(flags) : : "memory");
    return flags >> 9 & 1;
}

void irq_restore(int was_on)
{
    if (was_on)
        __asm__ volatile("sti" : : : "memory");
}

void machine_wait(void) { __asm__ volatile("sti; hlt" : : : "memory"); }

static void gate(int vector, char *handler, int level)
{
    u64 at = (word)handler;
    u64 low = (at & 0xFFFF) | KERNEL_CS << 16 | (u64)(0x8E00 | level << 13) << 32 |
              (at & 0xFFFF0000) << 32;
#ifdef __x86_64__
    idt[2 * vector] = low;
    idt[2 * vector + 1] = at >> 32;
#else
    idt[vector] = low;
#endif
}

/* --- what a process has of the processor --- */

void machine_stack(word top)
{
#ifdef __x86_64__
    *(u64 *)&tss[1] = top;
#else
    tss[1] = top;
    tss[2] = 0x10;
#endif
}

void machine_tls(word base)
{
#ifdef __x86_64__
    __asm__ volatile("wrmsr" : : "c"(0xC0000100), "a"((u32)base), "d"((u32)(base >> 32)));
#else
    gdt[5] = 0x00CFF2000000FFFF | (u64)(base & 0xFFFFFF) << 16 | (u64)(base >> 24) << 56;
    __asm__ volatile("mov %0,%%gs" : : "r"(0x2B));
#endif
}

void machine_watch(word at)
{
    __asm__ volatile("mov %0,%%dr0" : : "r"(at));
    __asm__ volatile("mov %0,%%dr7" : : "r"(at ? 0xD0401ul : 0x400ul));
}

word machine_watched(void)
{
    word why;
    __asm__ volatile("mov %%dr6,%0" : "=r"(why));
    __asm__ volatile("mov %0,%%dr6" : : "r"(0xFFFF0FF0ul));
    return why & 1;
}

void machine_fpu(int is_on)
{
    word cr0;
    if (is_on) {
        __asm__ volatile("clts");
    } else {
        __asm__ volatile("mov %%cr0,%0" : "=r"(cr0));
        __asm__ volatile("mov %0,%%cr0" : : "r"(cr0 | 8)); /* TS */
    }
}

/* --- the rest of the computer: TSC, 8254, 8259, 16550, ACPI --- */

u64 machine_time(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low; /* a tick is 1 ns here */
}

void machine_tick(void)
{
    outb(0x20, 0x20); /* the last one is done with */
    outb(0x43, 0x30); /* counter 0, once */
    outb(0x40, 11932 & 0xFF);
    outb(0x40, 11932 >> 8);
}

void machine_write(const char *text, word bytes)
{
    for (word n = 0; n < bytes; n++) {
        while (!(inb(0x3FD) & 0x20))
            ;
        outb(0x3F8, text[n]);
    }
}

int machine_read(void) { return inb(0x3FD) & 1 ? inb(0x3F8) : -1; }

void machine_off(void)
{
    __asm__ volatile("outw %0,%1" : : "a"((u16)0x3400), "d"((u16)0x604));
    for (;;)
        __asm__ volatile("cli; hlt");
}

void machine_port(void) { inb(0x80); }

void machine_priority(word level)
{
#ifdef __x86_64__
    __asm__ volatile("mov %0,%%cr8" : : "r"(level));
#else
    (void)level;
#endif
}

/* --- the beginning --- */

static void descriptors(void)
{
    u64 base = (word)tss;
#ifdef __x86_64__
    gdt[1] = 0x00AF9A000000FFFF;
    gdt[3] = 0x00AFFA000000FFFF;
#else
    gdt[1] = 0x00CF9A000000FFFF;
    gdt[3] = 0x00CFFA000000FFFF;
#endif
    gdt[2] = 0x00CF92000000FFFF;
    gdt[4] = 0x00CFF2000000FFFF;
    gdt[6] = 103 | (base & 0xFFFFFF) << 16 | 0x89ull << 40 | (base >> 24 & 0xFF) << 56;
    gdt[7] = base >> 32;
    tss[25] = 104 << 16; /* no map of ports */
    table.limit = sizeof gdt - 1;
    table.base = (word)gdt;
    __asm__ volatile("lgdt %0" : : "m"(table));
#ifdef __x86_64__
    __asm__ volatile("push %0; lea 1f(%%rip),%%rax; push %%rax; lretq; 1:" : : "i"(KERNEL_CS) : "rax");
#else
    __asm__ volatile("ljmp %0,$1f; 1:" : : "i"(KERNEL_CS));
#endif
    __asm__ volatile("mov %0,%%ss; mov %1,%%ds; mov %1,%%es; mov %1,%%fs; mov %1,%%gs"
                     : : "r"(0x10), "r"(USER_DS));
    __asm__ volatile("ltr %w0" : : "r"(0x30));
    for (int vector = 0; vector < 48; vector++)
        gate(vector, stubs + 16 * vector, vector == 3 || vector == 4 ? 3 : 0);
    gate(SYSTEM_CALL, system_call_stub, 3);
    table.limit = sizeof idt - 1;
    table.base = (word)idt;
    __asm__ volatile("lidt %0" : : "m"(table));
}

/* Of the boot parameters: the command line, and RAM from 1 MByte on. */
void machine_start(word parameters)
{
    extern char image_end[];
    const u8 *page = BY(parameters);
    u64 end = 0;
    for (int n = 0; n < page[0x1E8]; n++) {
        const u8 *row = page + 0x2D0 + 20 * n;
        u64 start = *(u64 *)row, bytes = *(u64 *)(row + 8);
        if (*(u32 *)(row + 16) == 1 && start <= 0x100000 && start + bytes > end)
            end = start + bytes;
    }
    descriptors();
    boot_root[0] = 0; /* no process has it */
    machine_use(GPA(boot_root));
    outb(0x20, 0x11), outb(0x21, TIMER), outb(0x21, 4), outb(0x21, 1), outb(0x21, 0xFE);
    outb(0xA0, 0x11), outb(0xA1, TIMER + 8), outb(0xA1, 2), outb(0xA1, 1), outb(0xA1, 0xFF);
    outb(0x3F9, 0), outb(0x3FB, 3), outb(0x3FA, 7);
    kernel_main(GPA(image_end), end > RAM_MOST ? RAM_MOST : (word)end & -PAGE,
                BY(*(u32 *)(page + 0x228)));
}
