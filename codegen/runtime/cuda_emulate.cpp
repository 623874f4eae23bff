/* Runs a CUDA kernel (cuda_builtins.h) on one processor: the threads of a block are fibers, which change only where they wait, in the
   order of their numbers or backwards. What depends on the order of threads between two barriers, or of blocks, is a race. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "cuda_builtins.h"

/* The last accesses of an element: its writer and its reader, when (a barrier ends an interval, and no two blocks have one in common), and what
   was there when a second thread wrote in the same interval, which is harmless where both write the same. */
struct Cell {
    char* at;
    unsigned long long value, written, read;
    int writer, reader, size;
    unsigned long long written_block, read_block;
    bool again;
};

enum State { READY, BARRIER, WARP, DONE };
typedef void (*Kernel)(const lt_arg*);

#if defined(__x86_64__)
extern "C" void lt_switch(void** save, void* to);
asm(".text\n.p2align 4\nlt_switch:\n pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp, (%rdi)\n movq %rsi, %rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
static void* lt_first(char* top, void (*entry)()) {
    void** s = (void**)(top - 8);
    *--s = (void*)entry;  /* the stack is where it is behind a call */
    return s - 6;
}
#elif defined(__aarch64__)
extern "C" void lt_switch(void** save, void* to);
asm(".text\n.p2align 4\nlt_switch:\n sub sp, sp, #160\n stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
    " stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
    " stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n mov x2, sp\n str x2, [x0]\n mov sp, x1\n"
    " ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n"
    " ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    " add sp, sp, #160\n ret\n");
static void* lt_first(char* top, void (*entry)()) {
    void** s = (void**)(top - 160);
    s[11] = (void*)entry;
    return s;
}
#else
#error "no switch of fibers for this processor"
#endif

static const int MOST = 1024;
static const size_t STACK = 768 << 10;

struct Lane { char bytes[16]; };
static struct {
    lt_block now;
    void* main;
    void* fiber[MOST];
    State state[MOST];
    int line[MOST];
    unsigned turn[MOST];  /* exchanges so far: two sets of values, because one lane may be a step ahead */
    Lane lanes[2][MOST];
    int current, count;
    bool together;  /* one fiber runs all threads: the kernel never waits */
    Kernel kernel;
    const lt_arg* args;
    char* message;
    bool failed;
    char* stacks;
    Cell* cells;
    size_t room, used;
    unsigned long long interval, block;
} g;

static void number(int t) {
    g.current = t;
    g.now.thread.x = t % g.now.group.x;
    g.now.thread.y = t / g.now.group.x % g.now.group.y;
    g.now.thread.z = t / g.now.group.x / g.now.group.y;
}

static void leave() {
    int t = g.together ? 0 : g.current;
    lt_switch(&g.fiber[t], g.main);
}

static void report(const char* what) {
    lt_block& b = g.now;
    if (!g.failed)
        snprintf(g.message, 512, "%s (block %u,%u,%u thread %u,%u,%u)", what, b.block.x, b.block.y, b.block.z, b.thread.x, b.thread.y, b.thread.z);
    g.failed = true;
}

static void fault(const char* buffer, long long index, long long extent, int line) {
    char what[400];
    if (extent < 0)
        snprintf(what, sizeof what, "index %lld is outside of an array of type %s\tline %d", index, buffer, line);
    else
        snprintf(what, sizeof what, "index %lld is outside of %s, which has %lld elements", index, buffer, extent);
    report(what);
    leave();  /* never to come back */
}

static Cell* find(char* at) {
    size_t k = ((size_t)at * 0x9e3779b97f4a7c15ull >> 20) & (g.room - 1);
    while (g.cells[k].at && g.cells[k].at != at) k = (k + 1) & (g.room - 1);
    return &g.cells[k];
}

static void grow() {
    Cell* old = g.cells;
    size_t n = g.room;
    g.room = n ? 2 * n : 1 << 14;
    g.cells = (Cell*)calloc(g.room, sizeof(Cell));
    for (size_t k = 0; k < n; k++)
        if (old[k].at) *find(old[k].at) = old[k];
    free(old);
}

static unsigned long long value_at(const char* p, int bytes) {
    unsigned long long v = 0;
    memcpy(&v, p, bytes);
    return v;
}

static bool same_value(Cell* c) { return !c->again || c->value == value_at(c->at, c->size); }

static void race(Cell* c, const char* how, int first) {
    char what[300];
    const char* where = c->at >= g.now.shared && c->at < g.now.shared_end ? "shared" : "global";
    snprintf(what, sizeof what, "race: threads %d and %d %s an element of %s memory with no barrier between them", first, g.current, how, where);
    report(what);
    leave();
}

static void access(void* p, int bytes, int writes) {
    char* at = (char*)p;
    if (at >= g.stacks && at < g.stacks + STACK * MOST) return;
    if (at >= (char*)&g && at < (char*)(&g + 1)) return;
    bool shared = at >= g.now.shared && at < g.now.shared_end;
    for (int step = bytes < 8 ? bytes : 4; bytes > 0; bytes -= step, at += step) {
        if (2 * g.used >= g.room) grow();
        Cell* c = find(at);
        if (!c->at) {
            c->at = at;
            c->size = step;
            g.used++;
        }
        bool met = c->written && (c->written == g.interval ? c->writer != g.current : !shared && c->written_block != g.block);
        if (writes) {
            if (c->read && (c->read == g.interval ? c->reader != g.current : !shared && c->read_block != g.block)) race(c, "read and write", c->reader);
            if (met && !same_value(c)) race(c, "write different values to", c->writer);
            if (met) c->value = value_at(at, step);
            c->again = met;
            c->writer = g.current;
            c->written = g.interval;
            c->written_block = g.block;
        } else {
            if (met) race(c, "write and read", c->writer);
            c->reader = c->read == g.interval && c->reader != g.current ? -1 : g.current;
            c->read = g.interval;
            c->read_block = g.block;
        }
    }
}

static void barrier(int line) {
    g.state[g.current] = BARRIER;
    g.line[g.current] = line;
    leave();
}

static const void* exchange(const void* mine, int bytes, int line) {
    int t = g.current;
    unsigned set = g.turn[t]++ & 1;
    memcpy(g.lanes[set][t].bytes, mine, bytes);
    g.state[t] = WARP;
    g.line[t] = line;
    leave();
    return g.lanes[set][t & ~31].bytes;
}

static void entry() {
    if (g.together) {
        int n = g.count;
        bool back = g.current > 0;
        for (int k = 0; k < n; k++) {
            number(back ? n - 1 - k : k);
            g.kernel(g.args);
        }
    } else {
        g.kernel(g.args);
        g.state[g.current] = DONE;
    }
    leave();
}

static bool release() {
    /* lets on who may go; false when nobody may */
    int n = g.count, waiting = 0, done = 0;
    bool any = false;
    for (int w = 0; w < n; w += 32) {
        int end = w + 32 < n ? w + 32 : n, ready = 0;
        for (int t = w; t < end; t++) ready += g.state[t] == WARP && g.line[t] == g.line[w];
        if (ready == end - w)
            for (int t = w; t < end; t++) g.state[t] = READY, any = true;
    }
    if (any) return true;
    int line = -1;
    bool same = true;
    for (int t = 0; t < n; t++) {
        if (g.state[t] == DONE) done++;
        if (g.state[t] == BARRIER) {
            same = same && (line < 0 || line == g.line[t]);
            line = g.line[t];
            waiting++;
        }
    }
    if (waiting == n && same) {
        for (int t = 0; t < n; t++) g.state[t] = READY;
        g.interval++;
        return true;
    }
    char what[300];
    snprintf(what, sizeof what, "divergent barrier: %d of %d threads wait at %s, %d have ended\tline %d", waiting, n, same ? "it" : "several", done, line);
    for (int t = 0; t < n; t++)
        if (g.state[t] != DONE) {
            number(t);
            break;
        }
    report(what);
    return false;
}

static bool run_block(char* stacks, bool back) {
    int n = g.count;
    if (g.together) {
        g.fiber[0] = lt_first(stacks + STACK, entry);
        g.current = back;
        lt_switch(&g.main, g.fiber[0]);
        return !g.failed;
    }
    for (int t = 0; t < n; t++) {
        g.fiber[t] = lt_first(stacks + STACK * (t + 1), entry);
        g.state[t] = READY;
        g.turn[t] = 0;
    }
    for (int done = 0; done < n;) {
        bool any = false;
        for (int k = 0; k < n; k++) {
            int t = back ? n - 1 - k : k;
            if (g.state[t] != READY) continue;
            any = true;
            number(t);
            lt_switch(&g.main, g.fiber[t]);
            if (g.failed) return false;
            done += g.state[t] == DONE;
        }
        if (!any && !release()) return false;
    }
    return true;
}

/* Every block of a launch. ``dims``: grid and group, x y z each. ``waits``: whether the kernel has barriers or exchanges. ``back``: blocks and
   threads from the last to the first. Returns 0, or 1 with a ``message`` of up to 512 bytes. */
extern "C" int lt_launch(Kernel kernel, void (*bind)(lt_block*), const lt_arg* args, const unsigned* dims, int waits, int back, char* message) {
    char*& stacks = g.stacks;
    memset(&g.now, 0, sizeof g.now);
    g.now.grid = {dims[0], dims[1], dims[2]};
    g.now.group = {dims[3], dims[4], dims[5]};
    g.now.barrier = barrier;
    g.now.exchange = exchange;
    g.now.fault = fault;
    g.now.access = access;
    g.count = dims[3] * dims[4] * dims[5];
    g.together = !waits;
    g.kernel = kernel;
    g.args = args;
    g.message = message;
    g.failed = false;
    if (!stacks) {
        stacks = (char*)mmap(0, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            stacks = 0;
            snprintf(message, 512, "no memory for the stacks of threads");
            return 1;
        }
    }
    bind(&g.now);
    unsigned long long total = (unsigned long long)dims[0] * dims[1] * dims[2];
    for (unsigned long long k = 0; k < total; k++) {
        unsigned long long b = back ? total - 1 - k : k;
        g.now.block = {(unsigned)(b % dims[0]), (unsigned)(b / dims[0] % dims[1]), (unsigned)(b / dims[0] / dims[1])};
        g.block = k;
        g.interval++;
        if (!run_block(stacks, back)) break;
    }
    for (size_t c = 0; c < g.room && !g.failed; c++)
        if (g.cells[c].at && !same_value(&g.cells[c])) {
            report("race: threads write different values to an element with no barrier between them");
            break;
        }
    free(g.cells);
    g.cells = 0;
    g.room = g.used = 0;
    return g.failed;
}
