// CUDA on a CPU, as much of it as commlib's kernels use: blocks, warps, shuffles.
//
// The lanes of a warp are coroutines. At a shuffle a lane leaves its value and gives way; when all 32
// have come to the same shuffle, they go on. A lane that ends while others wait, or that waits at
// another kind of shuffle, is what deadlocks or reads garbage on a GPU: here it aborts.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim {
    unsigned x;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

struct Lane {
    ucontext_t context;
    char* stack = nullptr;
    bool done = true;
    int site = 0;            // the shuffle it waits at
    unsigned count = 0;      // shuffles so far
    unsigned long long slot[2];
};

inline thread_local Lane lanes[WARP];
inline thread_local ucontext_t scheduler;
inline thread_local int current;
inline thread_local void (*body)(const void*);
inline thread_local const void* argument;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    std::abort();
}

inline void start() {
    body(argument);
    lanes[current].done = true;
}

// Leave a value at a shuffle, and return the value that lane `from` left.
template <class T>
T exchange(int site, T value, int from) {
    Lane& lane = lanes[current];
    const unsigned turn = lane.count++ & 1;  // lanes are at most one shuffle apart
    lane.site = site;
    lane.slot[turn] = 0;
    std::memcpy(&lane.slot[turn], &value, sizeof value);
    swapcontext(&lane.context, &scheduler);
    T found;
    std::memcpy(&found, &lanes[from].slot[turn], sizeof found);
    return found;
}

inline void run_warp(unsigned first_thread) {
    for (int i = 0; i < WARP; i++) {
        Lane& lane = lanes[i];
        if (!lane.stack) lane.stack = static_cast<char*>(std::malloc(STACK));
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack;
        lane.context.uc_stack.ss_size = STACK;
        lane.context.uc_link = &scheduler;
        lane.done = false;
        lane.count = 0;
        makecontext(&lane.context, start, 0);
    }
    for (;;) {
        int done = 0;
        for (current = 0; current < WARP; current++) {
            Lane& lane = lanes[current];
            if (!lane.done) {
                threadIdx.x = first_thread + current;
                swapcontext(&scheduler, &lane.context);
            }
            done += lane.done;
        }
        if (done == WARP) return;
        if (done) fail("some lanes ended while others wait at a shuffle");
        for (int i = 1; i < WARP; i++) {
            if (lanes[i].site != lanes[0].site || lanes[i].count != lanes[0].count) {
                fail("lanes wait at different shuffles");
            }
        }
    }
}

inline void launch(void (*kernel)(const void*), const void* call, unsigned blocks, unsigned threads) {
    body = kernel, argument = call;
    blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (unsigned thread = 0; thread < threads; thread += WARP) run_warp(thread);
    }
}

}  // namespace shim

inline void full(unsigned mask) {
    if (mask != ~0u) shim::fail("a shuffle without all lanes");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int k) {
    full(mask);
    return shim::exchange(1, value, (threadIdx.x & 31) ^ k);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int k) {
    full(mask);
    const int lane = threadIdx.x & 31;
    return shim::exchange(2, value, lane + k < shim::WARP ? lane + k : lane);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    full(mask);
    return shim::exchange(3, value, from);
}

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

inline unsigned __float_as_uint(float x) {
    unsigned b;
    std::memcpy(&b, &x, sizeof b);
    return b;
}

inline float __uint_as_float(unsigned b) {
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
}

// The sum rounded down: the nearest float, or the one below it where that is above the exact sum.
inline float __fadd_rd(float a, float b) {
    const float near = a + b, part = near - a;
    const float error = (a - (near - part)) + (b - part);  // exact (Knuth's two-sum)
    return error < 0 ? std::nextafterf(near, -INFINITY) : near;
}

inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)(b) << 32 | a;
    unsigned word = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned n = selector >> (4 * i) & 0xF;
        if (n & 8) shim::fail("byte_perm with a sign");
        word |= unsigned(both >> (8 * n) & 0xFF) << (8 * i);
    }
    return word;
}

// Instead of a kernel: a function that runs it on all blocks.
#define KERNEL(name, minimum, ...)                                                       \
    extern "C" void name(const void* call, unsigned blocks, unsigned threads) {      \
        shim::launch(                                                                \
            [](const void* c) { __VA_ARGS__(*static_cast<const Call*>(c)); }, call,  \
            blocks, threads);                                                        \
    }
