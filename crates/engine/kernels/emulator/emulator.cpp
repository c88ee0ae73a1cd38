// The kernels on the host: a shared library that runs them one thread at a time, for the stand-in of the driver
// (`crates/fake-cuda`), which owns memory, streams and errors. See emulator.h. x86-64 only.
#include "../cuda/all.cu"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <string>
#include <vector>

namespace emulator {

struct Entry {
    u32 threads, argument_bytes;
    void (*run)(const void*);
};

static std::map<std::string, Entry>& kernels() {
    static std::map<std::string, Entry> all;
    return all;
}

Kernel::Kernel(const char* name, u32 threads, u32 argument_bytes, void (*run)(const void*)) {
    kernels()[name] = Entry{threads, argument_bytes, run};
}

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    Position position;
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    bool done = false;
    // Runs on when this differs from `seen`.
    const u64* waits_for = nullptr;
    u64 seen = 0;
    u64 exchanges = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
};

struct Warp {
    u64 generation = 0;
    u32 arrived = 0;
    int site = 0;
    alignas(16) unsigned char slots[2][32 * 64];
};

Position* here;
unsigned char* shared;

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Fiber* current;
static void* scheduler_stack;
static u64 barrier_generation;
static u32 barrier_arrived, ended;
static int barrier_site;
static const Entry* entry;
static const void* arguments;
static const char* failure;
static char running[128];
static u32 shared_size;
// 0 ascending, 1 descending, else the seed of a random order. Odd ones carry out asynchronous copies at once.
static u64 order;

constexpr size_t STACK = 256 << 10;

// Saves what a function must preserve, changes the stack, restores.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void to_scheduler() { emulator_switch(&current->stack_pointer, scheduler_stack); }

[[noreturn]] static void fail(const char* message) {
    failure = message;
    to_scheduler();
    abort();
}

static void wait_while(const u64* generation, u64 seen) {
    current->waits_for = generation;
    current->seen = seen;
    to_scheduler();
}

void block_barrier(int site) {
    if (ended > 0) fail("a barrier that some threads do not reach");
    if (barrier_arrived == 0) barrier_site = site;
    if (barrier_site != site) fail("threads wait at different barriers");
    if (++barrier_arrived == fibers.size()) {
        barrier_arrived = 0;
        ++barrier_generation;
        return;
    }
    wait_while(&barrier_generation, barrier_generation);
}

const unsigned char* exchange(const void* value, u32 bytes, int site) {
    if (bytes > 64) fail("too much for an exchange");
    u32 lane = current->position.thread % 32;
    Warp& warp = warps[current->position.thread / 32];
    unsigned char* slots = warp.slots[current->exchanges++ % 2];
    memcpy(slots + 64 * lane, value, bytes);
    if (warp.arrived == 0) warp.site = site;
    if (warp.site != site) fail("lanes of a warp are at different places");
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.generation;
    } else {
        wait_while(&warp.generation, warp.generation);
    }
    return slots;
}

static void carry_out(const Copy& copy) {
    if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}

// A copy may take effect at any time until it is waited for: at once in odd orders, at last in even ones.
void copy_begin(void* to, const void* from, bool valid) {
    auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (!aligned(to) || !aligned(from)) fail("a copy between addresses that are not aligned");
    if (to < shared || static_cast<unsigned char*>(to) + 16 > shared + shared_size) fail("a copy out of shared memory");
    Copy copy = {to, from, valid};
    if (order % 2 == 1) carry_out(copy);
    current->open.push_back(copy);
}

void copy_commit() {
    current->committed.push_back(std::move(current->open));
    current->open.clear();
}

void copy_wait(u32 pending) {
    while (current->committed.size() > pending) {
        if (order % 2 == 0) {
            for (const Copy& copy : current->committed.front()) carry_out(copy);
        }
        current->committed.pop_front();
    }
}

static void fiber_main() {
    entry->run(arguments);
    if (!current->open.empty() || !current->committed.empty()) fail("a thread ends with copies under way");
    if (barrier_arrived > 0) fail("a thread ends while others wait at a barrier");
    current->done = true;
    ++ended;
    to_scheduler();
    abort();
}

static u64 random_state;

static u32 random_below(u32 bound) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<u32>((random_state >> 33) % bound);
}

static std::vector<u32> shuffled(u32 count) {
    std::vector<u32> out(count);
    for (u32 i = 0; i < count; ++i) out[i] = order == 1 ? count - 1 - i : i;
    if (order > 1) {
        for (u32 i = count; i > 1; --i) std::swap(out[i - 1], out[random_below(i)]);
    }
    return out;
}

// Runs every lane that can go on until it waits; false if none can, or something is wrong.
static bool run_warp(u32 warp) {
    bool moved = false;
    for (u32 lane : shuffled(32)) {
        Fiber& fiber = fibers[warp * 32 + lane];
        if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
        fiber.waits_for = nullptr;
        current = &fiber;
        here = &fiber.position;
        moved = true;
        emulator_switch(&scheduler_stack, fiber.stack_pointer);
        if (failure) return false;
    }
    return moved;
}

static void run_block(u32 threads, u32 x, u32 y, u32 z) {
    for (size_t i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.position = Position{static_cast<u32>(i), threads, x, y, z};
        fiber.done = false;
        fiber.waits_for = nullptr;
        fiber.exchanges = 0;
        fiber.open.clear();
        fiber.committed.clear();
        // The return address, aligned as at a function's entry, below it six registers.
        void** top = reinterpret_cast<void**>(fiber.stack + STACK - 64);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(fiber_main);
        top -= 6;
        memset(top, 0, 48);
        fiber.stack_pointer = top;
    }
    for (Warp& warp : warps) warp.arrived = 0, memset(warp.slots, 0xff, sizeof warp.slots);
    barrier_arrived = ended = 0;
    memset(shared, 0xff, shared_size);
    // Each warp runs as far as it can before the next one does, so that one that needs a barrier runs ahead.
    while (ended < threads) {
        bool moved = false;
        for (u32 warp : shuffled(threads / 32)) {
            while (run_warp(warp)) moved = true;
            if (failure) return;
        }
        if (!moved) {
            failure = "threads wait for others that never come";
            return;
        }
    }
}

static void on_fault(int signal_number) {
    char text[256];
    int length = snprintf(
        text, sizeof text, "emulator: signal %d in %s, block (%u, %u, %u), thread %u\n", signal_number, running,
        here ? here->x : 0, here ? here->y : 0, here ? here->z : 0, here ? here->thread : 0);
    if (write(2, text, static_cast<size_t>(length)) < 0) _exit(3);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void watch_for_faults() {
    static bool watching = false;
    if (watching) return;
    watching = true;
    stack_t stack = {};
    stack.ss_size = 64 << 10;
    stack.ss_sp = malloc(stack.ss_size);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS, SIGILL}) sigaction(number, &action, nullptr);
}

// `bytes` that end (rounded up to 16) at an inaccessible page.
static unsigned char* guarded(size_t bytes) {
    size_t page = 4096, rounded = (bytes + 15) / 16 * 16, pages = (rounded + page - 1) / page;
    void* base = mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    unsigned char* last = static_cast<unsigned char*>(base) + pages * page;
    mprotect(last, page, PROT_NONE);
    memset(last - rounded, 0xff, rounded);
    return last - rounded;
}

static void release(const void* memory, size_t bytes) {
    size_t page = 4096, rounded = (bytes + 15) / 16 * 16, pages = (rounded + page - 1) / page;
    munmap(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) / page * page), (pages + 1) * page);
}

static bool launch(const Entry& kernel, const char* name, u32 gx, u32 gy, u32 gz, u32 bytes, const void* a) {
    const u32 threads = kernel.threads;
    watch_for_faults();
    snprintf(running, sizeof running, "%s", name);
    failure = nullptr;
    entry = &kernel;
    arguments = a;
    shared_size = bytes;
    shared = guarded(bytes);
    random_state = order;
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack = guarded(STACK);
    }
    std::vector<Fiber> spare(std::make_move_iterator(fibers.begin() + threads), std::make_move_iterator(fibers.end()));
    fibers.resize(threads);
    warps.assign(threads / 32, Warp());
    for (u32 block : shuffled(gx * gy * gz)) {
        run_block(threads, block % gx, block / gx % gy, block / gx / gy);
        if (failure) break;
    }
    if (failure) {
        fprintf(stderr, "emulator: %s: %s (block %u, %u, %u)\n", name, failure, here->x, here->y, here->z);
    }
    for (Fiber& fiber : spare) fibers.push_back(std::move(fiber));
    release(shared, bytes);
    here = nullptr;
    return failure == nullptr;
}

}  // namespace emulator

using namespace emulator;

// One caller at a time, on any thread.
extern "C" {

// The order in which threads and blocks run from now on.
void emulator_order(u64 value) { order = value; }

// A kernel, its threads per block and the bytes of its argument structure; null if there is none.
const void* emulator_find(const char* name, u32* threads, u32* argument_bytes) {
    auto found = kernels().find(name);
    if (found == kernels().end()) return nullptr;
    *threads = found->second.threads;
    *argument_bytes = found->second.argument_bytes;
    return &*found;
}

// Runs all blocks; 0 if the kernel did nothing that is forbidden.
int emulator_launch(const void* kernel, u32 gx, u32 gy, u32 gz, u32 shared_memory, const void* a) {
    const auto& [name, found] = *static_cast<const std::pair<const std::string, Entry>*>(kernel);
    return launch(found, name.c_str(), gx, gy, gz, shared_memory, a) ? 0 : 1;
}

}  // extern "C"
