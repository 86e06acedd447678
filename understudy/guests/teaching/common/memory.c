/* Frames, page tables, address spaces; copy-on-write and demand-zero pages. */
#include "machine.h"

static u16 users[FRAMES_MOST]; /* how many address spaces have a frame; of free ones: 0 */
static u32 next[FRAMES_MOST], first_free, free_count;

void memory_start(word first, word end)
{
    if (end > RAM_MOST)
        end = RAM_MOST;
    for (word gpa = end - PAGE; gpa >= first; gpa -= PAGE) {
        next[gpa / PAGE] = first_free;
        first_free = gpa / PAGE;
        free_count++;
    }
}

u32 frames_free(void) { return free_count; }

word frame_new(void)
{
    int was_on = irq_save();
    u32 n = first_free;
    if (n) {
        first_free = next[n];
        free_count--;
        users[n] = 1;
    }
    irq_restore(was_on);
    if (n)
        memset(BY(n * PAGE), 0, PAGE);
    return n * PAGE;
}

void frame_release(word gpa)
{
    u32 n = gpa / PAGE;
    int was_on = irq_save();
    if (!--users[n]) {
        next[n] = first_free;
        first_free = n;
        free_count++;
    }
    irq_restore(was_on);
}

/* --- tables --- */

static int slot(word at, int level) { return at >> (12 + 9 * (level - 1)) & (ENTRIES - 1); }

static int slots(int level) { return level == LEVELS ? KERNEL_SLOT : ENTRIES; } /* of the user's */

/* The entry of the last level for an address; 0: there is none, or no memory to make it. */
u64 *entry_at(word root, word at, enum make make)
{
    u64 *table = BY(root);
    for (int level = LEVELS; level > 1; level--) {
        u64 *entry = &table[slot(at, level)];
        if (!(*entry & P)) {
            word made = make ? frame_new() : 0;
            if (!made)
                return 0;
            u64 link = entry_of(made, level == LEVELS ? LINK : P | RW | US);
            if (make == BUILD) {
                *entry = link;
            } else {
                machine_table(made);
                entry_write(entry, link);
                machine_commit();
            }
        }
        table = BY(gpa_of(*entry));
    }
    return &table[slot(at, 1)];
}

/* A root that has only the kernel's half.  Until space_ready nobody walks it: it is just memory. */
word space_new(void)
{
    word root = frame_new();
    if (root)
        ((u64 *)BY(root))[KERNEL_SLOT] = ((u64 *)BY(machine_kernel_root()))[KERNEL_SLOT];
    return root;
}

static void tables_ready(word table, int level)
{
    u64 *entries = BY(table);
    for (int n = 0; level > 1 && n < slots(level); n++)
        if (entries[n] & P)
            tables_ready(gpa_of(entries[n]), level - 1);
    machine_table(table);
}

void space_ready(word root)
{
    tables_ready(root, LEVELS);
    machine_root(root);
}

static int table_copy(u64 *from, word to, int level, word at)
{
    for (int n = 0; n < slots(level); n++) {
        word here = at + ((word)n << (12 + 9 * (level - 1)));
        u64 entry = from[n];
        if (!(entry & P))
            continue;
        if (level > 1) {
            if (!table_copy(BY(gpa_of(entry)), to, level - 1, here))
                return 0;
            continue;
        }
        u64 *copy = entry_at(to, here, BUILD);
        if (!copy)
            return 0;
        if (entry & RW) {
            entry = (entry & ~RW) | COW;
            entry_write(&from[n], entry);
        }
        *copy = entry;
        users[gpa_of(entry) / PAGE]++;
    }
    return 1;
}

int space_copy(word from, word to)
{
    int is_whole = table_copy(BY(from), to, LEVELS, 0);
    space_ready(to);
    machine_use(from); /* what was writable is not any more */
    return is_whole;
}

static void table_end(word table, int level)
{
    u64 *entries = BY(table);
    for (int n = 0; n < slots(level); n++)
        if (entries[n] & P) {
            word gpa = gpa_of(entries[n]);
            if (level > 1)
                table_end(gpa, level - 1);
            else
                frame_release(gpa);
        }
    machine_table_end(table);
    frame_release(table);
}

void space_end(word root)
{
    machine_root_end(root);
    table_end(root, LEVELS);
    machine_commit();
}

/* --- faults --- */

static int is_user(word at)
{
    extern char user_end[];
    return (at >= USER && at < (word)user_end) || (at >= HEAP && at < HEAP_END) ||
           (at >= STACK && at < STACK_END);
}

/* See to it that the current process can reach this address: 0 if it is not to. */
int page_in(word at, int is_write)
{
    if (!is_user(at))
        return 0;
    u64 *entry = entry_at(current->root, at, LIVE);
    if (!entry)
        return 0;
    u64 old = *entry, value;
    if (!(old & P)) {
        word gpa = frame_new();
        if (!gpa)
            return 0;
        value = entry_of(gpa, P | RW | US);
    } else if (is_write && !(old & RW)) {
        word gpa = gpa_of(old);
        if (users[gpa / PAGE] > 1) {
            word copy = frame_new();
            if (!copy)
                return 0;
            memcpy(BY(copy), BY(gpa), PAGE);
            frame_release(gpa);
            gpa = copy;
        }
        value = entry_of(gpa, P | RW | US);
    } else {
        return 1;
    }
    entry_write(entry, value);
    if (old & P)
        machine_invalidate(at);
    return 1;
}
