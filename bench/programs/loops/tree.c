/* Inserts into and searches a binary tree of 30,000 random keys. */
#include "bench.h"

enum { NODES = 30000 };
static struct node {
    struct node *child[2];
    uint64_t key;
} nodes[NODES];

static struct node *root;

void prepare(void) {
    uint64_t state = 77;
    for (int i = 0; i < NODES; i++) {
        struct node **link = &root, *fresh = &nodes[i];
        fresh->key = next_random(&state);
        while (*link) link = &(*link)->child[fresh->key > (*link)->key];
        *link = fresh;
    }
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0, state = 77;
    for (uint64_t i = 0; i < size * 1000; i++) {
        if (i % NODES == 0) state = 77;
        uint64_t key = next_random(&state), depth = 0;
        key ^= i & 1;
        for (struct node *at = root; at && at->key != key; at = at->child[key > at->key]) depth++;
        sum = sum * 3 + depth;
    }
    return sum;
}
